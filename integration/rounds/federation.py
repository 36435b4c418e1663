"""What all rules of a run share: the task, the model, the splits and the clients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import fedlora_kernels as flk
from integration.model.model import Model
from integration.model.tokens import Tokens
from integration.rounds.client import Client
from integration.rounds.evaluate import Score, evaluate
from integration.rounds.partition import own_tests, partition
from integration.settings import Settings
from integration.tasks import LoadedTask, load_task


@dataclass(frozen=True)
class Federation:
    """A task dealt to clients, beside the one model that they all train."""

    settings: Settings
    task: LoadedTask
    model: Model
    train: Tokens
    test: Tokens
    validation: Tokens
    clients: tuple[Client, ...]

    @classmethod
    def build(cls, settings: Settings) -> Federation:
        """Make the task, load the model, deal the examples. Raises SettingsError and TaskError."""
        task = load_task(settings)
        model = Model(settings, task)
        model.make_head(model.tokens(task.shared, settings.max_tokens))
        train = model.tokens(task.train, settings.max_tokens)
        test = model.tokens(task.test, settings.max_tokens)
        validation = model.tokens(task.validation, settings.max_tokens)
        clients = _clients(settings, train, test)
        return cls(settings, task, model, train, test, validation, clients)

    def with_seed(self, seed: int) -> Federation:
        """The same task and model, dealt and trained by another seed."""
        settings = replace(self.settings, seed=seed)
        clients = _clients(settings, self.train, self.test)
        return replace(self, settings=settings, clients=clients)

    def at(self, learning_rate: float) -> Federation:
        """The same, trained at another learning rate."""
        return replace(self, settings=replace(self.settings, learning_rate=learning_rate))

    def trial(self, learning_rate: float) -> Federation:
        """The same at another learning rate, evaluated once, by its loss on the validation split.

        Nothing is generated, and the clients have no tests of their own.
        """
        settings = replace(
            self.settings,
            learning_rate=learning_rate,
            evaluate_every=self.settings.rounds,
            client_test_size=0,
        )
        task, test = replace(self.task, right=None), self.validation
        clients = tuple(replace(client, tests=[]) for client in self.clients)
        return replace(self, settings=settings, task=task, test=test, clients=clients)

    @property
    def label(self) -> str:
        """Names the trial, or the runs, at this learning rate: their clients keep nothing else."""
        kind = "trial" if self.test is self.validation else "run"
        return f"{kind} at {self.settings.learning_rate!r}"

    def questions(self, start: Score) -> list[dict[str, str]]:
        """The test examples whose generated texts are kept: the question, the data set's answer and
        what the start model wrote.
        """
        return [
            {"question": x.question, "reference": x.completion or "", "start": text}
            for x, text in zip(self.task.test, start.texts, strict=False)
        ]

    def evaluate(self, *adapters: flk.Adapter, client: Client | None = None) -> Score:
        """The score of these adapters on the test split, or on the client's own test examples."""
        test = partial(evaluate, self.model, self.task, self.test, *adapters)
        settings, among = self.settings, None if client is None else client.tests
        return test(max_new_tokens=settings.max_new_tokens, answers=settings.answers, among=among)


def _clients(settings: Settings, train: Tokens, test: Tokens) -> tuple[Client, ...]:
    labels, tests = train.labels.tolist(), test.labels.tolist()
    size = settings.client_test_size
    return tuple(
        Client(
            number,
            rank,
            positions,
            own_tests([labels[position] for position in positions], tests, size, settings, number),
        )
        for number, (rank, positions) in enumerate(
            zip(settings.ranks, partition(labels, settings), strict=True)
        )
    )
