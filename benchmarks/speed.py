"""What this implementation costs, and how far that is from what the machine can do.

    python -m benchmarks.speed [--json OUT] [--size tiny|small|reference|qwen3-0.6b ...] [--quick] [--parts training|reading|answering ...]
                                                             sizes and parts that OUT has already stay in it
    python -m benchmarks.speed --profile [--size small]      the kernels of a training step instead, how long the device is busy in it, and what
                                                             --compile and --cuda-graphs of train.py make of it

Medians of several runs after warm-up; FLOP/s achieved are beside the machine's own matrix product in the same dtype. FLOPs
are counted by a formula (`flops` below) that is checked against torch's counter. Weights are random but for the two sizes that ship.

    size         hidden  layers  heads (kv)  ffn   vocabulary  r   meta rank
    tiny         192     6       6 (3)       512   8192        72  16         checkpoints/tiny: B of down_proj alone; a LoRA for answering, rank 8
    small        384     10      6 (3)       1024  8192        72  32         checkpoints/small: B of down_proj alone
    reference    256     8       4 (2)       768   4096        4   32         the size the paper's own code was timed at
    qwen3-0.6b   1024    28      16 (8)      3072  151936      8   128        bf16 weights
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from data import Ids, Parser, positive, run
from model import QWEN3, BlockAttention, Config, Decoder, LanguageModel, Recorded, lora_layout, pick_device, read_json, write_json
from shine import DEFAULT_MODEL, Shine, ShineConfig
from train import Graphs, compile_layers, one_pass, plain_attention

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("training", "reading", "answering")
SHIPPED = ("tiny", "small")      # folders of checkpoints/
SIZES = {
    "reference": (Config(vocab_size=4096, hidden_size=256, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
                         intermediate_size=768, rope_theta=1e6), ShineConfig(4, 32, 4)),
    "qwen3-0.6b": (Config(**QWEN3["qwen3-0.6b"]), ShineConfig(8, 128, 4, 0, 0.001)),
}


def median(call, runs=5, warm=2, seconds=60):
    """Median seconds of a call; stops early when `seconds` are spent."""
    times, began = [], time.perf_counter()
    for i in range(runs + warm):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        if i >= warm and time.perf_counter() - began > seconds:
            break
    return statistics.median(times[min(warm, len(times) - 1):])


def matmul_rate(dtype, device, n=2048):
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    return 2 * n ** 3 / median(lambda: a @ b, 7)


def read_rate(device, size=2 ** 28):
    """Bytes a second of summing up what fits no cache."""
    big = torch.ones(size, device=device)
    return big.nbytes / median(lambda: big.sum(), 7)


def peak_memory(size, dtype, B, N, S, checkpointing=False):
    """GiB of a process that makes two training steps on the CPU, Python and torch included."""
    code = (f"from benchmarks.speed import *; device = torch.device('cpu'); shine = build({size!r}, device, {dtype});"
            f"shine.base.checkpointing = shine.m2p.checkpointing = {checkpointing};"
            f"optimizer = torch.optim.AdamW(shine.trained().values(), lr=1e-5, fused=True); batch = batch_of({B}, {N}, {S}, shine.base.config.vocab_size, device);"
            "step(shine, batch, optimizer); step(shine, batch, optimizer); print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))")      # getrusage would count the parent
    return float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout) / 2 ** 20


def build(size, device, dtype):
    """-> a Shine with compute dtype `dtype`; weights in it too, but for qwen3 (bf16)."""
    if size in SHIPPED:
        shine = Shine.load(ROOT / "checkpoints" / size, device)
        shine.base.to(dtype)
        return shine
    config, hyper = SIZES[size]
    with torch.device("meta"):
        base = LanguageModel(config)
    base.to_empty(device=device).to(torch.bfloat16 if size in QWEN3 else dtype)
    generator = torch.Generator(device).manual_seed(0)
    for p in base.parameters():
        p.data.fill_(1.0) if p.dim() == 1 else p.data.normal_(0, 0.02, generator=generator)
    base.compute_dtype = dtype
    return Shine(base, Ids(config.vocab_size), hyper).to(device)


def batch_of(B, N, S, vocab, device):
    """Full rows, so without masks: N context tokens, S conversation tokens of which half carry loss."""
    g = torch.Generator().manual_seed(1)
    ids = lambda n: torch.randint(5, vocab, (B, n), generator=g)
    weights = torch.ones(B, S)
    weights[:, :S // 2] = 0
    out = {"context_ids": ids(N), "input_ids": ids(S), "weights": weights, "counted": weights[:, 1:].flatten().nonzero()[:, 0]}
    return {k: v.to(device) for k, v in out.items()}


def flops(c, h, M, B, N, S, counted):
    """FLOPs of one hypernetwork training pass, forward and back; the frozen base has no gradient of its weights.

    A product of T rows with an (in, out) matrix: 2 T in out. Back: once more for the input where something before it trains, once
    more for the weight where it trains. Attention scores and values: 4 T^2 q a layer (causality is not used to skip), back twice that.
    """
    L, H, q = c.num_hidden_layers, c.hidden_size, c.num_attention_heads * c.head_dim
    K = h.lora_layers or L
    body = L * sum(i * o for _, i, o in lora_layout(c))
    pair, pair_made = (layers * sum(i + o for _, i, o in lora_layout(c, modules)) for layers, modules in ((L, "all"), (K, h.target_modules)))
    T, kv = N + M, c.num_key_value_heads * c.head_dim
    wanted = (L - 1 + M / T) / L                                        # of the last layer's work but keys and values, N tokens need none
    body_read, pair_read = (whole * wanted + (1 - wanted) * L * 2 * one for whole, one in ((body, H * kv), (pair, H + kv)))
    reading = B * (2 * T * body_read * 2 + 4 * T * T * q * L * wanted * 3 + 2 * T * pair_read * h.meta_r * 3)
    m2p = B * h.m2p_layers * (2 * K * M * 8 * H * H * 3 + 4 * K * M * H * 3 * (K + M) / 2)
    back = L if h.answer_r else K                                       # of the conversation's layers: below these nothing trains
    answering = B * (2 * S * body * (1 + back / L) + 4 * S * S * q * (L + 2 * back) + 2 * S * (pair_made * h.r + pair * h.answer_r) * 3) + 2 * counted * c.vocab_size * H * 2
    return reading + m2p + answering


def counted(call):
    """FLOPs of a call by torch's counter, attention of full rows as plain matrix products: of its kernels the counter knows some, and heads
    that share keys in none; in blocks it would be less."""
    attention, longest = F.scaled_dot_product_attention, BlockAttention.LONGEST
    try:
        F.scaled_dot_product_attention, BlockAttention.LONGEST = plain_attention, 0
        with FlopCounterMode(display=False) as counter:
            call()
    finally:
        F.scaled_dot_product_attention, BlockAttention.LONGEST = attention, longest
    return counter.get_total_flops()


def step(shine, batch, optimizer, run_pass=one_pass):
    run_pass(shine, batch, batch["weights"][:, 1:].sum())
    optimizer.step()
    optimizer.zero_grad(set_to_none=run_pass is one_pass)


def training(size, device, dtype, shapes, rate):
    rows = {}
    for B, N, S in shapes:
        shine = optimizer = None      # those of the shape before
        shine = build(size, device, dtype)
        optimizer = torch.optim.AdamW(shine.trained().values(), lr=1e-5, fused=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        batch = batch_of(B, N, S, shine.base.config.vocab_size, device)
        count = counted(lambda: step(shine, batch, optimizer))
        formula = flops(shine.base.config, shine.config, shine.M, B, N, S, len(batch["counted"]))
        seconds = median(lambda: step(shine, batch, optimizer), 5, 1)
        rows[f"{B} x ({N} + {S})"] = {
            "seconds": seconds, "samples/s": B / seconds, "tokens/s": B * (N + S) / seconds, "of matmul rate": formula / seconds / rate,
            "formula / counter": formula / count}
        if device.type == "cuda":
            rows[f"{B} x ({N} + {S})"]["peak GiB"] = torch.cuda.max_memory_allocated() / 2 ** 30
        elif Path("/proc/self/status").is_file():
            shine.base.checkpointing = shine.m2p.checkpointing = True
            again = median(lambda: step(shine, batch, optimizer), 3, 1)
            shine = optimizer = None
            rows[f"{B} x ({N} + {S})"] |= {"peak GiB": peak_memory(size, dtype, B, N, S), "with checkpointing: peak GiB": peak_memory(size, dtype, B, N, S, True),
                                           "with checkpointing: samples/s": B / again}
    return rows


def base_training(size, device, dtype, B, T, rate):
    shine = build(size, device, dtype)
    base = shine.base.float().requires_grad_(True)
    base.compute_dtype = dtype
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-5, fused=True)
    batch = batch_of(B, 1, T, base.config.vocab_size, device)

    def one():
        base.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    count, seconds = counted(one), median(one, 5, 1)
    return {f"{B} x {T}": {"seconds": seconds, "tokens/s": B * T / seconds, "of matmul rate": count / seconds / rate}}


@torch.no_grad()
def reading(shine, lengths, batches=(1, 16)):
    """Text -> LoRA, split into reading, M2P, cutting."""
    rows = {}
    for B in batches:
        for N in lengths:
            if B > 1 and N > 1024 and total > 3:      # minutes on a CPU, and nothing new
                continue
            ids = torch.randint(5, shine.base.config.vocab_size, (B, N), device=shine.device)
            states = shine.read(ids)
            total, m2p = median(lambda: shine.generate_lora(ids, None), 5, 1, 30), median(lambda: shine.m2p(states), 5, 1, 10)
            parts = {"reading": median(lambda: shine.read(ids), 5, 1, 20), "M2P": m2p, "cutting": max(0.0, median(lambda: shine.to_lora(states), 5, 1, 10) - m2p)}
            rows[f"{B} x {N}"] = {"ms": 1000 * total} | {name: part / sum(parts.values()) for name, part in parts.items()}
            if ids.is_cuda:
                recorded = Recorded(lambda ids: shine.m2p(shine.read(ids)))
                rows[f"{B} x {N}"]["as a CUDA graph: ms"] = 1000 * median(lambda: shine.assemble(recorded(ids)), 5, 3, 10)
    return rows


@torch.no_grad()
def answering(shine, lengths, bandwidth, new=64, prompt=32):
    """A question of 32 tokens, 64 new ones: with the LoRA (with a Decoder, without one, 16 at once), and with texts of these lengths in the prompt.

    "of the bandwidth": bytes of the weights times steps a second, over what the machine reads a second (`read_rate`).
    """
    base, V = shine.base, shine.base.config.vocab_size
    weights = sum(p.nbytes for n, p in base.named_parameters() if base.config.tie_word_embeddings or "embed" not in n)
    lora = shine.generate_lora(torch.randint(5, V, (1, 64), device=shine.device), None)
    many = shine.generate_lora(torch.randint(5, V, (16, 64), device=shine.device), None)

    def timed(ids, with_lora=None, **options):
        tokens = lambda: base.generate(ids, lora=with_lora, max_new_tokens=new, **options)
        first, all_of_them = median(lambda: next(tokens()), 5, 1, 20), median(lambda: list(tokens()), 3, 1, 30)
        return {"first token ms": 1000 * first, "tokens/s": len(ids) * new / all_of_them,
                "of the bandwidth": (new - 1) / (all_of_them - first) * weights / bandwidth}
    ask = torch.randint(5, V, (1, prompt), device=shine.device)
    rows = {"LoRA, as a conversation does it": timed(ask, lora, decoder=Decoder(base, lora)), "LoRA, layer by layer": timed(ask, lora),
            "no LoRA, layer by layer": timed(ask), "16 questions, 16 LoRAs": timed(ask.expand(16, -1).contiguous(), many)}
    compiled = Decoder(base, lora)
    if ask.is_cuda and compiled.fast:
        compiled.compiled = True
        rows["LoRA, its layers compiled"] = timed(ask, lora, decoder=compiled)
    plain = Decoder(base)
    for n in (0, *lengths):
        rows[f"text of {n} tokens in the prompt"] = timed(torch.randint(5, V, (1, n + prompt), device=shine.device), decoder=plain)
    return rows


def trainings(size, device, dtype, rate, quick):
    """The parts "base training" and "training" of a size."""
    cuda = device.type == "cuda"
    if size in QWEN3:
        return {"training": {} if quick else training(size, device, dtype, [(1, 256, 256)] + [(4, 1024, 1024)] * cuda, rate)}
    shapes = [(1, 256, 256), (16, 256, 256)] + [(128, 64, 160)] * cuda + [(1, 1024, 1024)] * (size == "reference" and not quick)
    return {"base training": base_training(size, device, dtype, 16, 256, rate), "training": training(size, device, dtype, shapes, rate)}


def cold_start(runs=5):
    """Seconds of `python shine.py TEXT --ask Q` until the first answer, and what they are spent on."""
    code = ("import time; t = [time.perf_counter()]; import shine; t.append(time.perf_counter()); s = shine.Shine.load(shine.DEFAULT_MODEL);"
            "t.append(time.perf_counter()); l = s.generate_lora('Mara keeps a green parrot called Biscuit in the lighthouse.');"
            "t.append(time.perf_counter()); next(s.conversation(l).stream('Who keeps a parrot?')); t.append(time.perf_counter());"
            "print([b - a for a, b in zip(t, t[1:])])")
    parts, total = [], []
    for _ in range(runs):
        started = time.perf_counter()
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        total.append(time.perf_counter() - started)
        parts.append(json.loads(out))
    names = ("imports s", "loading s", "reading s", "first answer token s")
    return {name: statistics.median(p[i] for p in parts) for i, name in enumerate(names)} | {"whole process s": statistics.median(total)}


def exponent(xs, ys):
    """The slope of log y over log x: y grows as x to this power."""
    xs, ys = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mx, my = statistics.mean(xs), statistics.mean(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / sum((x - mx) ** 2 for x in xs)


@torch.no_grad()
def growth(device, dtype):
    """Exponents of the milliseconds from text to LoRA: over text length, rank, layers."""
    config, hyper = SIZES["reference"]
    out = {}

    def ms(config, hyper, N):
        torch.manual_seed(0)
        base = LanguageModel(config).to(device, dtype)
        shine = Shine(base, Ids(), hyper).to(device)
        ids = torch.randint(5, config.vocab_size, (1, N), device=device)
        return 1000 * median(lambda: shine.generate_lora(ids, None), 5, 2, 20)
    for name, values, make in (("text length", (256, 512, 1024, 2048), lambda v: (config, hyper, v)),
                               ("rank", (4, 8, 16), lambda v: (config, ShineConfig(v, 32, 4), 256)),
                               ("layers", (4, 8, 16), lambda v: (Config(**{**config.__dict__, "num_hidden_layers": v}), hyper, 256))):
        times = [ms(*make(v)) for v in values]
        out[name] = {"values": list(values), "ms": times, "exponent": exponent(values, times)}
    return out


def kernels(size, device, dtype, top=20):
    """Print what a step of the hypernetwork (with AdamW) spends its time on: each kernel's (on a CPU: operation's) own, and the whole step's;
    on a GPU, then, the step as CUDA graphs, compiled (with its kernels), and both."""
    from torch.profiler import ProfilerActivity, profile
    cuda = device.type == "cuda"
    B, N, S = ((12, 1024, 1024) if size in QWEN3 else (128, 64, 160)) if cuda else (4, 64, 160)
    shine = build(size, device, dtype)
    optimizer = torch.optim.AdamW(shine.trained().values(), lr=1e-5, fused=True)
    batch = batch_of(B, N, S, shine.base.config.vocab_size, device)
    work, rate = flops(shine.base.config, shine.config, shine.M, B, N, S, len(batch["counted"])), matmul_rate(dtype, device, 8192 if cuda else 2048)

    def timed(name, run_pass=one_pass):
        try:
            seconds = median(lambda: step(shine, batch, optimizer, run_pass), 10, 4)
        except torch.OutOfMemoryError:
            return print(f"{size}, {B} x ({N} + {S}), {name}: does not fit into the memory", flush=True)
        print(f"{size}, {B} x ({N} + {S}), {name}: {1000 * seconds:.1f} ms a step, {work / seconds / rate:.1%} of the matrix product's {rate / 1e12:.3g} TFLOP/s", flush=True)

    def listed():
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
            step(shine, batch, optimizer)
            if cuda:
                torch.cuda.synchronize()
        own = lambda row: row.self_device_time_total if cuda else row.self_cpu_time_total      # microseconds
        rows = sorted((row for row in seen.key_averages() if own(row)), key=own, reverse=True)      # without the launches, which have no device time
        print(f"{sum(map(own, rows)) / 1000:.1f} ms of it in {sum(row.count for row in rows):,} kernels")
        print("\n".join(f"{own(row) / 1000:9.2f} ms {row.count:6d} x  {row.key[:100]}" for row in rows[:top]), flush=True)
    timed("as it is")
    listed()
    if cuda:
        timed("CUDA graphs", Graphs(shine))
        optimizer.zero_grad(set_to_none=True)
        compile_layers(shine.base, shine, dynamic=False)
        timed("compiled")
        listed()
        timed("compiled, CUDA graphs", Graphs(shine))


def keep(path, result):
    """Write the result into the JSON file, where there is one, beside the sizes, and parts of a size, that are in it already."""
    if path:
        old = read_json(path) if Path(path).is_file() else {}
        write_json(path, old | {k: old.get(k, {}) | v if isinstance(v, dict) else v for k, v in result.items()})


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--size", nargs="*", default=[*SHIPPED, "reference", "qwen3-0.6b"], choices=[*SHIPPED, *SIZES])
    parser.add_argument("--quick", action="store_true", help="short lengths and small batches only")
    parser.add_argument("--lengths", nargs="*", type=positive(int), help="tokens of the texts (64 256 1024 4096; --quick 64 256)")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what to time of each size (all)")
    parser.add_argument("--sizes-only", action="store_true", help="no cold start, no growth with length, rank and layers")
    parser.add_argument("--profile", action="store_true", help="only the kernels of a training step, the slowest first")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--float32", action="store_true", help="no bf16, also where the processor multiplies it")
    args = parser.parse_args(argv)
    device, dtype, why = pick_device(args.device, args.float32)
    if args.profile:
        return [kernels(size, device, dtype) for size in args.size if size not in QWEN3 or device.type == "cuda"]
    rate = matmul_rate(dtype, device, 8192 if device.type == "cuda" else 2048)
    result = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {why}", "torch": torch.__version__}
    bandwidth = read_rate(device)
    lengths = args.lengths or ((64, 256) if args.quick else (64, 256, 1024, 4096))
    for size in args.size:
        big = size in QWEN3
        part = result[size] = {}
        if "training" in args.parts:
            part |= {"matmul GFLOP/s": rate / 1e9} | trainings(size, device, dtype, rate, args.quick)
        shine = build(size, device, dtype).to(dtype).eval()      # as shine.py has them; in training the M2P's own weights are float32
        if "reading" in args.parts:
            part["text to LoRA"] = reading(shine, lengths[:3] if big and device.type == "cpu" else lengths, (1,) if big and device.type == "cpu" else (1, 16))
        if "answering" in args.parts:
            part["read GB/s"], part["answering"] = bandwidth / 1e9, answering(shine, lengths[:3] if big else lengths, bandwidth)
        del shine
        print(json.dumps({size: part}, indent=1), flush=True)
        keep(args.json, result)
    if not args.sizes_only:
        result["cold start"] = cold_start()
        if not args.quick:
            result["growth"] = growth(device, dtype)
    print(json.dumps({k: v for k, v in result.items() if k not in args.size}, indent=1))
    keep(args.json, result)


if __name__ == "__main__":
    run(main)
