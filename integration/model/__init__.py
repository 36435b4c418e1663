"""The model of a run: a base in memory, its adapters and their training.

loading.py      the base model and its tokenizer: pretrained, or random weights of a named shape
tokenizer.py    a tokenizer trained at run time, for models without one
tokens.py       a split in the model's tokens, as padded batches
model.py        one base in memory, LoRA adapters that are switched
class_means.py  a classification head that stays as it starts
trainer.py      transformers' Trainer, kept for all clients
serialize.py    adapters as plain tensors and JSON types
total.py        several adapters on one base as a single adapter
pretrain.py     a small Llama from scratch, to start from; progress.py is its bar
"""
