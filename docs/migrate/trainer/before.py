import torch
from torch import nn
from transformers import Trainer, TrainingArguments


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x, labels):
        return {"loss": nn.functional.mse_loss(self.body(x), labels)}


def train(steps=10):
    torch.manual_seed(0)
    model = Model()
    data = [{"x": x, "labels": x[:1]} for x in torch.randn(8, 16)]
    arguments = TrainingArguments(
        "last",
        bf16=True,
        use_cpu=True,
        per_device_train_batch_size=8,
        max_steps=steps,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        logging_steps=1,
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [param.detach() for param in model.parameters()]
