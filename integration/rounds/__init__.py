"""One round: adapters to the clients, local training, aggregation, evaluation.

federation.py   task, model, splits and clients, which all rules share
partition.py    which client holds which examples, and which clients take part in a round
client.py       local training: adapter in, update out
engine.py       how the clients of a round are reached: in this process, or on Flower (flower/)
rule.py         the rules that the settings allow, and what their clients train
server.py       one rule: updates in, a record and the next start of every client out
traffic.py      bytes of a round, from shapes
evaluate.py     accuracy and loss of a model on a split
loop.py         one rule through its rounds
state.py        the state after a finished round, for --resume
records.py      settings.json, metrics.jsonl, the adapters
"""
