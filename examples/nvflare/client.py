"""A site: the model in, one round of training, the adapter and its config out."""

import json

import nvflare.client as flare
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from task import RANKS, get_model, train

flare.init()
site = flare.get_site_name()
rank = RANKS[site]
while flare.is_running():
    received = flare.receive()
    model = get_model(rank)
    own = get_peft_model_state_dict(model)
    if all(own[key].shape == tensor.shape for key, tensor in received.params.items()):
        set_peft_model_state_dict(model, received.params)  # else the first model, of another rank
    steps = train(model, site)
    tensors = {key: x.contiguous() for key, x in get_peft_model_state_dict(model).items()}
    config = json.dumps({"r": rank, "lora_alpha": 2 * rank})
    meta = {"NUM_STEPS_CURRENT_ROUND": steps, "adapter_config": config}
    flare.send(flare.FLModel(params=tensors, meta=meta))
