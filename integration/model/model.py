"""The model of a run: one base in memory, adapters that are switched.

There is never a second copy of the base. PEFT holds one adapter slot per distinct rank; a client
takes its slot by writing its factors there. A global update of whatever ranks is evaluated beside
the base weights (a hook adds `scaling * B A x` to what a module gives out), so that an evaluation
neither touches the base nor loses small updates in its bfloat16.

What a rule merges into the base is summed up in float32 and added to the loaded weights, which are
rounded to the base's dtype once, however many rounds have merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model, get_peft_model_state_dict
from peft import set_peft_model_state_dict as set_state
from torch import Tensor, nn

import fedlora_kernels as flk
from integration.model import loading
from integration.model.class_means import ClassMeans
from integration.model.tokens import Batch, Completions, Tokens
from integration.settings import Settings, SettingsError
from integration.settings.seeds import BASE, generator
from integration.tasks import LoadedTask

EVALUATION_BATCH = {"cpu": 32, "cuda": 128}
"""Texts per forward pass outside training; a GPU is idle with few of them."""

PREFIX = "base_model.model."

SIDES = {
    "lora": {"a": ".lora_A.{slot}.weight", "b": ".lora_B.{slot}.weight"},
    "vera": {"a": ".vera_lambda_d.{slot}", "b": ".vera_lambda_b.{slot}"},
}
"""What a factor's parameter is called in a live PEFT model."""


class Model:
    """A model whose base weights and adapters are handled from outside, in place.

    Attributes:
        network: token numbers in, logits out.
        tokenizer: the model's own.
        device: where it lies.
        evaluation_batch: texts per forward pass outside training.
        modules: names of the modules that carry an adapter.
    """

    def __init__(self, settings: Settings, task: LoadedTask) -> None:
        base, self.tokenizer = loading.load(settings, task)
        self.device = next(base.parameters()).device
        self.evaluation_batch = EVALUATION_BATCH[self.device.type]
        self.classes = len(task.classes)
        self._settings = settings
        self._language = task.kind == "language"
        self._configs = {
            rank: peft_config(settings, task, rank) for rank in sorted(set(settings.ranks))
        }
        first, *others = self._configs
        with loading.quiet():
            try:
                self._peft = get_peft_model(base, self._configs[first], adapter_name=_slot(first))
            except ValueError as error:
                raise SettingsError(f"{settings.model}: {str(error).splitlines()[0]}") from None
            for rank in others:
                self._peft.add_adapter(_slot(rank), self._configs[rank])
            if settings.gradient_checkpointing:
                base.enable_input_require_grads()
                base.gradient_checkpointing_enable({"use_reentrant": False})
        self._peft.eval()
        self.network: nn.Module = self._peft
        if task.kind == "classification" and settings.head == "means":
            width = base.config.hidden_size
            self.network = ClassMeans(self._peft, self.classes, width, settings.logit_scale)
            self.network.to(self.device)
        self._layers = {
            name.removeprefix(PREFIX).removesuffix(".base_layer"): layer
            for name, layer in self._peft.named_modules()
            if name.endswith(".base_layer")
        }
        self._loaded: dict[str, Tensor] = {}
        self._merged: dict[str, Tensor] = {}
        self._heads = {
            key: tensor.detach().clone()
            for key, tensor in self._state(first).items()
            if "lora_" not in key and "vera_lambda" not in key
        }
        self._ranks = {rank: self._module_ranks(rank) for rank in self._configs}

    # ---- adapters ------------------------------------------------------------------------------

    @property
    def modules(self) -> list[str]:
        """Names of the modules that carry an adapter."""
        return list(self._layers)

    def fresh(self, rank: int, *seed: int) -> flk.Adapter:
        """A start of the given rank: A uniform in +-1/sqrt(n), B = 0 (VeRA: d = 0.1, b = 0).

        The rows of A are drawn for the largest rank of the run, so that a client of smaller rank
        starts from the first rows of the same A. `seed` (run, round) decides all of it.
        """
        drawn_from = generator(*seed)
        state = dict(self._heads)
        for name, layer in self._layers.items():
            m, n = layer.weight.shape
            own = self._ranks[rank][name]
            if self._settings.method == "vera":
                state[f"{PREFIX}{name}.vera_lambda_b"] = torch.zeros(m, device=self.device)
                state[f"{PREFIX}{name}.vera_lambda_d"] = torch.full((own,), 0.1, device=self.device)
                continue
            most = max(ranks[name] for ranks in self._ranks.values())
            a = torch.empty(most, n).uniform_(-(n**-0.5), n**-0.5, generator=drawn_from)
            state[f"{PREFIX}{name}.lora_A.weight"] = a[:own].clone().to(self.device)
            state[f"{PREFIX}{name}.lora_B.weight"] = torch.zeros(m, own, device=self.device)
        return flk.Adapter.from_state_dict(state, self._configs[rank])

    def take(self, adapter: flk.Adapter, trains: str = "both") -> list[nn.Parameter]:
        """Write the adapter into the slot of its rank, make it active, return what trains in it.

        `trains` is "both", "a" or "b" (the other factor stays as it is); trained heads always do.
        """
        slot = _slot(int(adapter.config["r"]))
        self._peft.set_adapter(slot)
        if adapter.vera:
            set_state(self._peft, adapter.state_dict(), adapter_name=slot)
        else:
            adapter.to_model(self._peft, slot)
        kind = SIDES["vera" if adapter.vera else "lora"]
        sides = ("a", "b") if trains == "both" else (trains,)
        endings = tuple(kind[side].format(slot=slot) for side in sides)
        trained: list[nn.Parameter] = []
        for name, parameter in self._peft.named_parameters():
            head = f".modules_to_save.{slot}." in name
            parameter.requires_grad_(name.endswith(endings) or head)
            if parameter.requires_grad:
                trained.append(parameter)
        return trained

    def give(self, rank: int, name: str | None = None) -> flk.Adapter:
        """A copy of what the slot of this rank holds; `name` is what errors call it."""
        copied = {key: tensor.detach().clone() for key, tensor in self._state(rank).items()}
        return flk.Adapter.from_state_dict(copied, self._configs[rank], name=name)

    def _state(self, rank: int) -> dict[str, Tensor]:
        with loading.quiet():
            state = get_peft_model_state_dict(
                self._peft,
                adapter_name=_slot(rank),
                save_embedding_layers=False,  # "auto" looks for a config.json, which GGUF has not
            )
        return dict(state)

    def _module_ranks(self, rank: int) -> dict[str, int]:
        adapter = self.give(rank)
        if adapter.vera:
            return {name: len(d) for name, (_, d) in adapter.vera.items()}
        return {name: factors.rank for name, factors in adapter.factors.items()}

    # ---- base weights --------------------------------------------------------------------------

    def merge(self, *adapters: flk.Adapter) -> None:
        """Add the adapters' updates to the base: W = W_loaded + the sum of all that was merged."""
        for adapter in adapters:
            for name in adapter.factors:
                weight = self._layers[name].weight.data
                loaded = self._loaded.setdefault(name, weight.clone())
                update = adapter.delta(name).float()
                self._merged[name] = self._merged[name] + update if name in self._merged else update
                weight.copy_(loaded.float() + self._merged[name])

    def restore(self) -> None:
        """Put the base weights back to the ones that were loaded, bit for bit."""
        for name, loaded in self._loaded.items():
            self._layers[name].weight.data.copy_(loaded)
        self._merged.clear()

    def base(self) -> dict[str, Tensor]:
        """A copy of the base weights of the adapted modules, as they are now."""
        return {name: layer.weight.detach().clone() for name, layer in self._layers.items()}

    @contextmanager
    def carrying(self, *adapters: flk.Adapter) -> Iterator[None]:
        """Within the block the model computes with the adapters' updates and heads, and no other.

        The ranks may be any, also different ones in every module. A VeRA adapter must come alone.
        """
        with ExitStack() as stack:
            heads = [adapter for adapter in adapters if adapter.extras]
            if heads and heads[-1].vera:
                self.take(heads[-1])
            elif heads:
                carrier = self.fresh(min(self._configs), 0)
                self.take(flk.Adapter(carrier.factors, carrier.config, extras=heads[-1].extras))
            else:
                stack.enter_context(self._peft.disable_adapter())
            for adapter in adapters:
                for name, factors in () if adapter.vera else adapter.factors.items():
                    hook = _Update(factors, self.device)
                    handle = self._layers[name].register_forward_hook(hook)
                    stack.callback(handle.remove)
            yield

    # ---- forward -------------------------------------------------------------------------------

    def tokens(self, examples: Any, max_tokens: int) -> Tokens:
        """A split of the run's task in this model's tokens."""
        return (Completions if self._language else Tokens)(examples, self.tokenizer, max_tokens)

    def here(self, batch: Batch) -> Batch:
        """The batch on the model's device."""
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def make_head(self, shared: Tokens) -> None:
        """Take the class means of the shared split under the base weights as the head."""
        if not isinstance(self.network, ClassMeans):
            return
        if not len(shared):
            raise SettingsError("the shared split is empty; the head needs examples of every class")
        embedded, labels = [], []
        with torch.inference_mode(), self._peft.disable_adapter():
            for positions in shared.in_order_of_length(self.evaluation_batch):
                batch = self.here(shared.batch(positions))
                labels.append(batch.pop("labels"))
                embedded.append(self.network.embed(**batch))
        self.network.learn(torch.cat(embedded), torch.cat(labels))


class _Update:
    """A forward hook that adds `scaling * B A x` to a linear layer's output."""

    def __init__(self, factors: flk.Factors, device: torch.device) -> None:
        self.a = factors.a.float().to(device)
        self.b = (factors.scaling * factors.b.double()).float().to(device)

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        update = inputs[0].float() @ self.a.T @ self.b.T
        return (output.float() + update).to(output.dtype)


def _slot(rank: int) -> str:
    return f"rank{rank}"


def peft_config(settings: Settings, task: LoadedTask, rank: int) -> PeftConfig:
    """PEFT's config of the clients of this rank; alpha / r is the same in every module."""
    common: dict[str, Any] = {"r": rank, "target_modules": list(settings.target_modules)}
    if task.kind == "language":
        common["task_type"] = "CAUSAL_LM"
    elif settings.head == "trained":
        common["task_type"] = "SEQ_CLS"
    if settings.method == "vera":
        # The projections travel with the adapter so that its update can be compared with others.
        return VeraConfig(**common, projection_prng_key=BASE, save_projection=True)
    return LoraConfig(
        **common,
        lora_alpha=settings.lora_scaling * rank,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern={k: settings.lora_scaling * r for k, r in settings.rank_pattern.items()},
        use_rslora=settings.method == "rslora",
        bias="none",
    )
