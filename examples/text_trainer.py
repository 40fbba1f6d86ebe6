"""Score texts by the Trainer's own run, keep half of them, and train a pruned BERT on those.

Run: python examples/text_trainer.py   (needs transformers: pip install '.[llm]')
"""

import random

import datasets
import transformers

import datapruning
import sparsemodel
from datapruning.recommend.language import train_tokenizer

transformers.set_seed(0)
WORDS = {"bad": ["dull", "slow", "broken"], "good": ["fine", "quick", "rich"]}
labels = random.choices(list(WORDS), k=160)
texts = [" ".join(random.choices(WORDS[label] + ["the", "film"], k=6)) for label in labels]
tokenizer = train_tokenizer(texts, vocabulary=300)  # yours comes from AutoTokenizer
dataset = datasets.Dataset.from_dict({"text": texts, "label": labels})
samples = datapruning.tokenized(dataset, tokenizer)

size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
config = transformers.BertConfig(vocab_size=300, num_attention_heads=2, **size)
model = transformers.BertForSequenceClassification(config)
mask, recorder = sparsemodel.prune(model, density=0.2), datapruning.DynamicsRecorder(samples)
options = {"use_cpu": True, "report_to": [], "learning_rate": 2e-3, "remove_unused_columns": False}
arguments = transformers.TrainingArguments("runs", **options)
collate = transformers.DataCollatorWithPadding(tokenizer)
hold = sparsemodel.MaskCallback(mask)

data = datapruning.indexed(samples)
transformers.Trainer(model, arguments, collate, data, callbacks=[hold, recorder]).train()
kept = recorder.table("aum").select(keep=0.5, class_balanced=True).of(samples)
transformers.Trainer(model, arguments, collate, kept, callbacks=[hold]).train()
result = datapruning.evaluate(model, samples, task=datapruning.TextClassification())
density = sparsemodel.mask_of(sparsemodel.sparsify(model, mask)).density
print(f"trained on {len(kept)} of {len(samples)} texts, density {density:.2f}: {result.accuracy}")
