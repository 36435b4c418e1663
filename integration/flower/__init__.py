"""The same rounds on Flower: a ServerApp and a ClientApp on its Message API.

    python -m integration compare --engine flower            a simulation on this machine
    flwr run integration/flower/app CONNECTION --stream      a deployment (docs/flower.md)

    server process                                    client process (one per client, or Ray's)
    compare -> run_rounds -> FlowerEngine  ------>  ClientApp: what it starts from, what was
                  aggregation by              train   merged since it was last asked, the settings
                  fedlora_kernels  <--------------->  Client.train, as in the local engine
                                       the update

    client.py    the ClientApp
    moments.py   AdamW's moments as Flower's records
    strategy.py  ComparisonStrategy: the library's LoraStrategy, with the comparison's own server
    engine.py    FlowerEngine: the round's nodes are found, the strategy's messages brought to them
    server.py    the ServerApp: `compare` with that engine
    launch.py    a SuperLink on this machine and one `flwr run`
    app/         what `flwr run` ships: two files that import the two apps from here

Everything else (settings, tasks, rules, records, resume, report) is the local engine's own code, so
equal seeds give equal adapters. Flower's nodes need this checkout on their PYTHONPATH.
"""
