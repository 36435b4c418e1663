"""The ServerApp: one import differs from an app that averages the factors with FedAvg."""

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from fedlora_kernels.interop.flower import LoraStrategy as FedAvg
from flowertune.task import get_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds; the global adapter is saved as a PEFT folder."""
    model = get_model()
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(model)),
        train_config=ConfigRecord({"learning-rate": context.run_config["learning-rate"]}),
        num_rounds=int(context.run_config["rounds"]),
    )
    set_peft_model_state_dict(model, result.arrays.to_torch_state_dict())
    model.save_pretrained(str(context.run_config["out"]))
