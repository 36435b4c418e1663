"""Flower's own programs on this machine: a SuperLink, SuperNodes, and runs of an app on them."""

import subprocess
from contextlib import contextmanager

from integration.flower import launch


@contextmanager
def started(log, program, *flags):
    """One of Flower's programs, ended with the block."""
    command = [launch._program(program), "--insecure", *flags]
    home = log.parent
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=launch._environment(home), stdout=file, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def deploy(stack, folder, clients):
    """A SuperLink and a SuperNode per client; the address and the nodes' processes."""
    port = launch._free_port()
    link = started(
        folder / "link.log",
        "flower-superlink",
        "--disable-runtime-dependency-installation",
        *("--host", "127.0.0.1", "--port", str(port)),
    )
    launch._wait_for(stack.enter_context(link), port, folder / "link.log")
    nodes = [
        stack.enter_context(
            started(
                folder / f"node-{number}.log",
                "flower-supernode",
                *("--superlink", f"127.0.0.1:{port}"),
                *("--host", "127.0.0.1", "--port", str(launch._free_port())),
                *("--node-config", f"partition-id={number}"),
            )
        )
        for number in range(clients)
    ]
    return f"127.0.0.1:{port}", nodes


def run(app, home, values, *, superlink=None, clients=2):
    """``flwr run`` of an app with a run config, in a simulation or on a deployment's SuperLink."""
    environment = launch._environment(home)
    (home / "run.toml").write_text("".join(f"{name} = {value}\n" for name, value in values.items()))
    with launch._superlink(home, environment, superlink) as address:
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{launch.CONNECTION}"\n\n[superlink.{launch.CONNECTION}]\n'
            f'address = "{address}"\ninsecure = true\n'
        )
        command = ["run", str(app), launch.CONNECTION, "--stream"]
        command += ["--run-config", str(home / "run.toml")]
        if superlink is None:
            command += ["--federation-config", f"num-supernodes={clients}"]
        launch._require_success(launch._run(command, environment), environment)
