"""Score texts by the Trainer's own run, keep the better half, and train a pruned BERT on it.

Run: python examples/text_trainer.py
"""

import random

import datasets
import tokenizers
import transformers

import datapruning
import sparsemodel

random.seed(0)
transformers.set_seed(0)
WORDS = {"bad": ["dull", "slow", "broken", "poor"], "good": ["fine", "quick", "solid", "rich"]}
texts, labels = [], []
for _ in range(200):
    labels.append(random.choice(["bad", "good"]))
    texts.append(" ".join(random.choices(WORDS[labels[-1]] + ["the", "a", "film"], k=6)))
dataset = datasets.Dataset.from_dict({"text": texts, "label": labels})

words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[PAD]"))
words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
words.train_from_iterator(texts, tokenizers.trainers.WordLevelTrainer(special_tokens=["[PAD]"]))
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
samples = datapruning.tokenized(dataset, tokenizer)  # finds the columns, numbers the labels

size = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, intermediate_size=64)
config = transformers.BertConfig(**size, num_attention_heads=2)
model = transformers.BertForSequenceClassification(config)
mask, recorder = sparsemodel.prune(model, density=0.2), datapruning.DynamicsRecorder(samples)


def train(data, *callbacks):
    options = dict(output_dir="runs", use_cpu=True, report_to=[], learning_rate=1e-3)
    arguments = transformers.TrainingArguments(**options, remove_unused_columns=False)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    hold = sparsemodel.MaskCallback(mask)
    transformers.Trainer(model, arguments, collate, data, callbacks=[hold, *callbacks]).train()


train(datapruning.indexed(samples), recorder)  # three epochs, each recorded
kept = recorder.table("aum").select(keep=0.5, class_balanced=True)
train(kept.of(samples))
accuracy = datapruning.evaluate(model, samples, task=datapruning.TextClassification()).accuracy
print(f"kept {len(kept)} of {len(samples)} texts; accuracy {accuracy:.3f}")
print(f"weights left: {sparsemodel.mask_of(sparsemodel.sparsify(model, mask)).density:.3f}")
