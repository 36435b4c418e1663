"""transformers' Trainer, kept for all clients of a run.

A client brings its batches, its learning rate and, where it keeps them, its AdamW moments; the
Trainer, its accelerator and the model stay. So a client of the quickstart (8 steps of 16 texts)
costs 1.23 s of CPU time, and 1.22 s in a loop written out by hand (one thread of an AMD EPYC).
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from integration.model.model import Model
from integration.model.tokens import IGNORED, Batch, Tokens, predicted
from integration.settings import Settings

Moments = dict[int, dict[str, Tensor]]
"""AdamW's state of the trained parameters, by their place in the model's order."""


class LocalTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that trains one client after the other on the same model."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self._settings = settings
        self._home = model
        self._frequencies: Tensor | None = None
        self._language = False
        arguments = TrainingArguments(
            output_dir=tempfile.gettempdir(),  # nothing is written there: it saves and logs nothing
            use_cpu=model.device.type == "cpu",
            per_device_train_batch_size=settings.batch_size,
            lr_scheduler_type="constant",
            max_grad_norm=settings.max_grad_norm,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        if arguments.device.type == "cuda":
            arguments._n_gpu = 1  # with more of them it would copy the model to each
        super().__init__(model.network, arguments, compute_loss_func=self._loss)
        self.remove_callback(PrinterCallback)
        self._steps = _Steps()
        self.add_callback(self._steps)
        # Every train() collects garbage: 0.26 s through all that torch and transformers have
        # imported, against 1.2 s of training. Frozen objects are not looked at.
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def fit(
        self,
        parameters: Sequence[nn.Parameter],
        tokens: Tokens,
        batches: Sequence[Sequence[int]],
        *,
        rate: float,
        seed: int,
        frequencies: Tensor | None = None,
        moments: Moments | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> tuple[float, Moments]:
        """One AdamW step on every batch; the mean loss, and the moments at the end.

        `frequencies` [classes] are added to the logits of a classification. `moments` is the state
        to start from, from an earlier call with parameters of the same shapes. Random numbers, of
        which there are none without dropout, come from `seed`.
        """
        set_seed(seed)
        self._frequencies = None if frequencies is None else frequencies.to(self.args.device)
        self._language = tokens.batch(batches[0][:1])["labels"].dim() == 2
        self._loader = DataLoader(_Batches(batches), batch_size=None, collate_fn=tokens.batch)
        self._steps.call = on_step
        self.args.max_steps = len(batches)
        self.args.learning_rate = rate
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=self._settings.weight_decay)
        if moments is not None:
            groups = optimizer.state_dict()["param_groups"]
            copied = {
                place: {name: x.clone() for name, x in state.items()}
                for place, state in moments.items()
            }
            optimizer.load_state_dict({"state": copied, "param_groups": groups})
        self.optimizer: Any = optimizer
        loss = float(self.train().training_loss)
        self.optimizer = None
        return loss, dict(optimizer.state_dict()["state"])

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The client's batches, in their order."""
        return self._loader

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward through the batch, one micro-batch after the other; its mean loss.

        Every micro-batch is divided by what the loss counts in the whole batch, so the gradients
        add up to the whole batch's. The Trainer's own accumulation wants as many micro-batches in
        every step; a client's last batch is short, and may be trained on at any time.
        """
        counted = inputs["labels"][:, 1:] if self._language else inputs["labels"]
        items = (counted != IGNORED).sum().clamp(min=1)
        losses = [
            super(LocalTrainer, self).training_step(model, self._predicting(part), items)
            for part in _parts(inputs, self._settings.micro_batch_size)
        ]
        return torch.stack(losses).sum()

    def _predicting(self, part: Batch) -> dict[str, Any]:
        """The model's arguments: of a language model, only the logits that the loss looks at."""
        return {**part, "logits_to_keep": predicted(part["labels"])} if self._language else part

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        """The share of the batch's mean cross-entropy that these rows have."""
        logits = outputs.logits.float()
        if self._language:
            labels = labels[:, -logits.shape[1] :]
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        elif self._frequencies is not None:
            logits = logits + self._frequencies
        total = cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return total / num_items_in_batch


def _parts(batch: Batch, size: int | None) -> Iterator[Batch]:
    """The batch's rows, `size` at a time, without the columns that none of them fills."""
    rows = len(batch["labels"])
    if size is None or size >= rows:
        yield batch
        return
    for start in range(0, rows, size):
        part = {name: tensor[start : start + size] for name, tensor in batch.items()}
        longest = int(part["attention_mask"].sum(1).max())
        yield {name: x[:, :longest] if x.dim() == 2 else x for name, x in part.items()}


class _Batches(Dataset[Sequence[int]]):
    """Lists of positions, in the order in which they are trained on."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, place: int) -> Sequence[int]:
        return self._batches[place]


class _Steps(TrainerCallback):  # type: ignore[misc]
    """Tells the progress bar of every step."""

    def __init__(self) -> None:
        self.call: Callable[[], None] = lambda: None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.call()
