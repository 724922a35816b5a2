# Copy this file beside common.py and made.py, then: torchrun --nproc-per-node 2 train_ddp.py
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import load_mnist
from made import MADE


class Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.loss(x)[0]


dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
device = "cpu"
if torch.cuda.is_available():
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
images = load_mnist(device=device)[0]
model = MADE(hidden=400).to(device)
parallel = DistributedDataParallel(Loss(model))  # all start with the weights of process 0
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
torch.manual_seed(dist.get_rank())  # different images and noise in each process
for step in range(1, 101):
    x = images[torch.randint(len(images), (64,), device=device)]
    optimizer.zero_grad()
    loss = parallel(x)
    loss.backward()
    optimizer.step()
    if step % 20 == 0 and dist.get_rank() == 0:
        print(f"step {step} | loss {loss.item():.1f}")
if dist.get_rank() == 0:
    torch.save({"config": {"hidden": 400}, "model": model.state_dict()}, "ddp.pt")
dist.destroy_process_group()
