"""The peer of `tessera bench train`: the same transformer and the same training step in PyTorch.

Started as `python3 -c THIS JSON` with the sizes; says one line: "ready NAME", or "none WHY" and ends. Then each line on
standard input is a number of steps to run, and each line on standard output the seconds that they took.

A step: forward, cross entropy, backward, clip, AdamW, on tokens of the same shape. dtype bf16: under autocast, with f32
weights. device: cpu, or cuda, where a time ends when all work is done. Where torch.compile works, a few steps each decide between it and eager mode.
"""

import json
import sys
import time
import warnings

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError as error:
    print("none", error, flush=True)
    sys.exit(0)

warnings.filterwarnings("ignore")
c = json.loads(sys.argv[1])
torch.set_num_threads(c["threads"])
torch.manual_seed(1)


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, c["eps"])


def linear(into, out):
    return nn.Linear(into, out, bias=False)


def turned(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        hidden, head = c["hidden"], c["hidden"] // c["heads"]
        self.norm, self.post = Norm(hidden), Norm(hidden)
        self.q, self.o = linear(hidden, hidden), linear(hidden, hidden)
        self.k, self.v = linear(hidden, c["kv_heads"] * head), linear(hidden, c["kv_heads"] * head)
        self.gate, self.up, self.down = linear(hidden, c["ffn"]), linear(hidden, c["ffn"]), linear(c["ffn"], hidden)

    def heads(self, x, n):
        return x.view(x.shape[0], x.shape[1], n, -1).transpose(1, 2)

    def forward(self, x, cos, sin):
        h = self.norm(x)
        q = turned(self.heads(self.q(h), c["heads"]), cos, sin)
        k = turned(self.heads(self.k(h), c["kv_heads"]), cos, sin)
        v = self.heads(self.v(h), c["kv_heads"])
        o = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=c["kv_heads"] != c["heads"])
        x = x + self.o(o.transpose(1, 2).reshape(x.shape))
        h = self.post(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(c["vocab"], c["hidden"])
        self.blocks = nn.ModuleList(Block() for _ in range(c["layers"]))
        self.norm = Norm(c["hidden"])
        half = c["hidden"] // c["heads"] // 2
        angle = torch.outer(torch.arange(c["tokens"]), c["theta"] ** (-torch.arange(half) / half))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, token, target):
        x = self.embed(token)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())


if c["device"] != "cpu" and not torch.cuda.is_available():
    print("none", "this PyTorch sees no GPU", flush=True)
    sys.exit(0)
model = Model()
gpu = c["device"] != "cpu"
model = model.to(c["device"])
token, target = torch.randint(c["vocab"], (2, c["sequences"], c["tokens"]), device=c["device"]).unbind()
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def run(forward, steps):
    if gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        with torch.autocast(c["device"], torch.bfloat16, enabled=c["dtype"] == "bf16"):
            loss = forward(token, target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


best, name = model, "eager"
run(model, 1)
if c["compile"]:
    try:
        compiled = torch.compile(model)
        run(compiled, 2)
        for _ in range(2):
            eager, fast = run(model, 2), run(compiled, 2)
        if fast < eager:
            best, name = compiled, "compiled"
    except Exception:  # no compiler on this machine, or one that it cannot use
        pass
print("ready", "torch", torch.__version__, name, flush=True)
for line in sys.stdin:
    print(run(best, int(line)), flush=True)
