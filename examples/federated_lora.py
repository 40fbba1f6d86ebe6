"""Clients adapt a small language model by LoRA: only the adapters travel.

python examples/federated_lora.py   (needs transformers and peft: pip install '.[llm]')
"""

import copy

import peft
from transformers import LlamaConfig, LlamaForCausalLM

import datapruning
import fedprune


def samples(*words):
    rows = [{"text": f"{a} {b} {c}."} for a in words for b in words for c in words if a != b != c]
    return datapruning.tokenized(rows, lambda text: list(text.encode()))  # letters are tokens


sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_attention_heads=4, **sizes))
training = datapruning.TrainingConfig(epochs=8, batch_size=16, lr=0.01, optimizer="adamw")
base = datapruning.train(samples("cat", "dog", "cow", "hen", "pig"), model=model, training=training)


def adapted():
    """The base, frozen and the same on every node, with adapters that are trained."""
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(copy.deepcopy(base), lora)


texts, settings = samples("rain", "snow", "wind", "sun", "fog"), {"training.lr": 0.02}
federation = {"method": "fedavg", "rounds": 4, "clients": 2, "optimizer": "adamw"}
result = fedprune.run(model=adapted, data=texts, settings=settings, **federation)
losses = [round(line["test_loss"], 3) for line in result.metrics if "round" in line]
print(f"test loss by round: {losses}")
print(f"a client sent {result.summary['bytes_up_steady_round']:,} bytes a round")
