"""The model and the training, as in any app of Flower: nothing here knows of the aggregation."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = 64


def get_model() -> PeftModel:
    """A small random Llama with LoRA adapters; put a pretrained model in its place."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **shape, **heads))
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))


def train(model: PeftModel, client: int, steps: int, learning_rate: float) -> tuple[float, int]:
    """Train on the client's own sequences; the last loss and the number of sequences."""
    examples = 8 + 4 * client
    drawn = torch.Generator().manual_seed(client)
    tokens = torch.randint(WORDS, (examples, 1), generator=drawn) + torch.arange(12) * (client + 1)
    tokens %= WORDS
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
    return float(loss), examples
