"""The model and the training, as in any NVFlare job: nothing here knows of the aggregation."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = 64
RANKS = {"site-1": 8, "site-2": 4}
STEPS = {"site-1": 2, "site-2": 4}


def get_model(rank: int) -> PeftModel:
    """A small random Llama with LoRA adapters in bfloat16; put a pretrained model in its place."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **shape, **heads)).bfloat16()
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])
    return get_peft_model(base, config, autocast_adapter_dtype=False)


class InitialAdapter(nn.Module):
    """What the recipe starts from: the adapter alone, under PEFT's keys."""

    def __init__(self) -> None:
        super().__init__()
        self.model = get_model(max(RANKS.values()))

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """The adapter's tensors."""
        return get_peft_model_state_dict(self.model)


def train(model: PeftModel, site: str) -> int:
    """Train on the site's own sequences; the number of steps."""
    number = int(site.removeprefix("site-"))
    drawn = torch.Generator().manual_seed(number)
    tokens = torch.randint(WORDS, (8, 1), generator=drawn) + torch.arange(12) * number
    tokens %= WORDS
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.01)
    model.train()
    for _ in range(STEPS[site]):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return STEPS[site]
