"""What Flower sets in its own processes, without which no message can be made."""

from flwr.supercore.task_identity import TaskIdentity

for name in ("run_id", "node_id", "task_id"):
    setattr(TaskIdentity, f"_{name}", 1)
