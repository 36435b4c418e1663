"""The model of a run: one encoder in memory, LoRA through PEFT, a head that stays as it starts.

The head compares the mean-pooled embedding e(x) with the means mu_c of the classes' embeddings in
the shared split, both of length 1:

    logits_c = logit_scale * <e(x), mu_c>

It is made from the start model and then frozen, so only the adapters move the accuracy. (A fresh
random head does not learn in the few dozen steps of a quick run.)

There is never a second copy of the encoder. PEFT holds one adapter slot per distinct rank; a client
takes its slot by writing its factors there, and a global update of whatever rank is judged by
adding it to the base weights for as long as the judging takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import fedlora_kernels as flk
from integration.pretrained import folder
from integration.tokens import Batch, Tokens

EVALUATION_BATCH = 32
"""Texts per forward pass outside training."""


class Model:
    """An encoder whose base weights, adapters and head are handled from outside, in place."""

    def __init__(
        self,
        name: str,
        ranks: Iterable[int],
        lora_scaling: float,
        target_modules: Iterable[str],
        logit_scale: float,
    ) -> None:
        weights = folder(name)
        self.tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True)
        self._configs = {
            rank: LoraConfig(
                r=rank,
                lora_alpha=lora_scaling * rank,
                target_modules=list(target_modules),
                bias="none",
            )
            for rank in sorted(set(ranks))
        }
        first, *others = self._configs
        with _quiet():
            encoder = AutoModel.from_pretrained(
                weights, local_files_only=True, add_pooling_layer=False, dtype=torch.float32
            )
            self._peft = get_peft_model(encoder, self._configs[first], adapter_name=_slot(first))
            for rank in others:
                self._peft.add_adapter(_slot(rank), self._configs[rank])
        self._peft.eval()  # no dropout: the same step gives the same bits
        self._targets = _targets(self._peft)
        self._pristine = {name: weight.clone() for name, weight in self._targets.items()}
        self._logit_scale = logit_scale
        self._class_means: Tensor | None = None

    # ---- adapters ------------------------------------------------------------------------------

    @property
    def modules(self) -> list[str]:
        """Names of the modules that carry an adapter."""
        return list(self._targets)

    @property
    def classes(self) -> int:
        """Number of classes of the head; RuntimeError before `make_head`."""
        return len(self._head)

    @property
    def _head(self) -> Tensor:
        if self._class_means is None:
            raise RuntimeError("the model has no head yet; call make_head(shared split)")
        return self._class_means

    def fresh(self, rank: int, *seed: int) -> flk.Adapter:
        """A start of the given rank: A uniform in +-1/sqrt(n), B = 0.

        The rows of A are drawn for the largest rank of the run, so that a client of smaller rank
        starts from the first rows of the same A. `seed` (run, round) decides all of it.
        """
        drawn_from = generator(*seed)
        state: dict[str, Tensor] = {}
        for name, weight in self._targets.items():
            m, n = weight.shape
            a = torch.empty(max(self._configs), n).uniform_(
                -(n**-0.5), n**-0.5, generator=drawn_from
            )
            state[f"base_model.model.{name}.lora_A.weight"] = a[:rank].clone()
            state[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(m, rank)
        return flk.Adapter.from_state_dict(state, self._configs[rank])

    def take(self, adapter: flk.Adapter, trains: str = "both") -> list[nn.Parameter]:
        """Write the adapter into the slot of its rank, make it active, return what trains in it.

        `trains` is "both", or "b" (A stays as it is).
        """
        slot = _slot(next(iter(adapter.factors.values())).rank)
        self._peft.set_adapter(slot)
        adapter.to_model(self._peft, slot)
        trained: list[nn.Parameter] = []
        for name, parameter in self._peft.named_parameters():
            parameter.requires_grad_(
                name.endswith(f".lora_B.{slot}.weight")
                or (trains == "both" and name.endswith(f".lora_A.{slot}.weight"))
            )
            if parameter.requires_grad:
                trained.append(parameter)
        return trained

    def give(self, rank: int, name: str | None = None) -> flk.Adapter:
        """A copy of what the slot of this rank holds; `name` is what errors call it."""
        state = get_peft_model_state_dict(self._peft, adapter_name=_slot(rank))
        copied = {key: tensor.detach().clone() for key, tensor in state.items()}
        return flk.Adapter.from_state_dict(copied, self._configs[rank], name=name)

    # ---- base weights --------------------------------------------------------------------------

    def merge(self, *adapters: flk.Adapter) -> None:
        """Add the adapters' updates to the base weights: W <- W + scaling * B A."""
        for adapter in adapters:
            for name in adapter.factors:
                self._targets[name] += adapter.delta(name).to(self._targets[name].dtype)

    def restore(self) -> None:
        """Put the base weights back to the ones that were loaded, bit for bit."""
        for name, weight in self._targets.items():
            weight.copy_(self._pristine[name])

    def base(self) -> dict[str, Tensor]:
        """A copy of the base weights of the adapted modules, as they are now."""
        return {name: weight.clone() for name, weight in self._targets.items()}

    @contextmanager
    def merged(self, *adapters: flk.Adapter) -> Iterator[None]:
        """Within the block the base carries the adapters' updates and no slot is active."""
        before = self.base()
        try:
            self.merge(*adapters)
            with self._peft.disable_adapter():
                yield
        finally:
            for name, weight in self._targets.items():
                weight.copy_(before[name])

    # ---- forward -------------------------------------------------------------------------------

    def embed(self, batch: Batch) -> Tensor:
        """Mean of the last hidden states over a text's tokens, scaled to length 1: [n, hidden]."""
        hidden = self._peft(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).last_hidden_state
        mask = batch.attention_mask.unsqueeze(-1).to(hidden.dtype)
        return normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def logits(self, batch: Batch) -> Tensor:
        """[n, classes]; RuntimeError before `make_head`."""
        return self._logit_scale * self.embed(batch) @ self._head.T

    def make_head(self, shared: Tokens, classes: int) -> None:
        """Take the class means of the shared split under the base weights as the head."""
        sums: Tensor | None = None
        with torch.inference_mode(), self._peft.disable_adapter():
            for batch in shared.in_order_of_length(EVALUATION_BATCH):
                embedded = self.embed(batch)
                if sums is None:
                    sums = embedded.new_zeros(classes, embedded.shape[1])
                sums.index_add_(0, batch.labels, embedded)
        if sums is None:
            raise ValueError("the shared split is empty; the head needs examples of every class")
        self._class_means = normalize(sums, dim=1).clone()

    def judge(self, tokens: Tokens, *adapters: flk.Adapter) -> tuple[float, float]:
        """Accuracy and mean cross-entropy of the base with these adapters' updates on `tokens`."""
        right, loss = 0, 0.0
        with torch.inference_mode(), self.merged(*adapters):
            for batch in tokens.in_order_of_length(EVALUATION_BATCH):
                logits = self.logits(batch)
                right += int((logits.argmax(1) == batch.labels).sum())
                loss += float(cross_entropy(logits, batch.labels, reduction="sum"))
        return right / len(tokens), loss / len(tokens)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar, its note on the unused pooler and PEFT's use of an old name."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _slot(rank: int) -> str:
    return f"rank{rank}"


def generator(*seed: int) -> torch.Generator:
    """A generator of its own for one (run, round, ...)."""
    mixed = 0
    for part in seed:
        mixed = (mixed * 1_000_003 + part + 1) % (2**63)
    return torch.Generator().manual_seed(mixed)


def _targets(peft_model: nn.Module) -> dict[str, Tensor]:
    """Module name -> its base weight [m, n], detached, sharing memory with the model."""
    prefix, suffix = "base_model.model.", ".base_layer.weight"
    return {
        name.removeprefix(prefix).removesuffix(suffix): parameter.detach()
        for name, parameter in peft_model.named_parameters()
        if name.endswith(suffix)
    }
