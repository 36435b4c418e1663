"""The ClientApp: the arrays in, one round of training, the arrays out."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from flowertune.task import get_model, train

app = ClientApp()


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """One round on this node's data."""
    model = get_model()
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    loss, examples = train(
        model,
        int(context.node_config["partition-id"]),
        int(context.run_config["steps"]),
        float(message.content["config"]["learning-rate"]),
    )
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord({"train_loss": loss, "num-examples": examples}),
        }
    )
    return Message(content=content, reply_to=message)
