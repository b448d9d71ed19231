"""The same work, done by a script of this repository and by what a user would otherwise use, side by side in one run.

    python benchmarks/peers.py decoder_only      training step: nanoGPT's loop; generation: nanoGPT, transformers
    python benchmarks/peers.py encoder_only      training step: transformers' BertForMaskedLM, a real vocabulary
    python benchmarks/peers.py encoder_decoder   beam search and training step: transformers' T5
    python benchmarks/peers.py llama3            cached greedy decoding: transformers' generate
    python benchmarks/peers.py qwen3_moe         forward + backward of a mixture: transformers' eager and grouped forms
    python benchmarks/peers.py kv_cache          one token at a time: transformers' generate, memory bandwidth
    python benchmarks/peers.py flash_attention   forward, backward, errors: PyTorch's flash kernel (needs a CUDA GPU)
    python benchmarks/peers.py lora_qlora        one step of full fine-tuning, LoRA, QLoRA: peft's LoRA
    python benchmarks/peers.py dpo               one DPO step: two models and two forward passes
    python benchmarks/peers.py ppo_grpo          a rollout: transformers' generate
    python benchmarks/peers.py bpe_tokenizer     training: minbpe's algorithm, Hugging Face tokenizers; encoding speed

Absolute times depend on the machine and on what else runs on it. So the contenders take turns within one process, the
number of threads is fixed, and the figure to read is the ratio. Everything goes to results/peers_NAME.json.
nanoGPT and minbpe are re-implemented here from their descriptions (MIT, A. Karpathy): what counts is that the same
operations run, in the same order, with the same shapes.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


# --- measuring -------------------------------------------------------------------------------------------------------
def load_script(name):
    """Import one script of the repository by its path."""
    path = ROOT / f"{name}.py"
    if not path.is_file():
        sys.exit(f"error: there is no {path.name} in the repository")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name while it is being executed
    spec.loader.exec_module(module)
    return module


def find_data():
    """Point $LLM_DATA at the first folder that holds Tiny Shakespeare. -> its path, or None: the Python docs then."""
    for folder in (os.environ.get("LLM_DATA"), "data", ROOT / "data", ROOT.parent / "shared" / "data"):
        if folder and (Path(folder) / "tinyshakespeare.txt").is_file():
            os.environ["LLM_DATA"] = str(Path(folder).resolve())
            return Path(folder) / "tinyshakespeare.txt"
    return None


def corpus():
    """-> (text, its name)."""
    path = find_data()
    if path:
        return path.read_text(encoding="utf-8"), "shakespeare"
    from pydoc_data.topics import topics
    return "\n\n".join(topics[key] for key in sorted(topics)), "pydocs"


def take_turns(contenders, rounds, warm_up=True):
    """{name: function() -> seconds} -> {name: [seconds per round]}. The order is reversed in every other round.

    Round 0, the warm-up, is thrown away: caches fill, libraries start their threads, clocks settle.
    """
    seconds = {name: [] for name in contenders}
    for turn in range(0 if warm_up else 1, rounds + 1):
        order = list(contenders)
        for name in order if turn % 2 else order[::-1]:
            taken = contenders[name]()
            if turn:
                seconds[name].append(taken)
    return seconds


def timed(work):
    """A function that runs `work` and returns the seconds it took."""

    def run():
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return run


def times_faster(seconds, ours, theirs):
    """How many times faster we are: the median over rounds, each round compared with its own neighbour in time."""
    return statistics.median(b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True))


def environment(threads):
    import torch
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux only
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    load = [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": threads, "system": platform.platform(),
            "python": platform.python_version(), "torch": torch.__version__, "load_average_at_start": load}


def write_json(path, content):
    """Temporary file, then rename: an interrupted run leaves the old results alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def print_table(title, rows):
    """rows: (left, right) pairs of text."""
    width = max(len(left) for left, _ in rows)
    print(f"\n{title}")
    for left, right in rows:
        print(f"  {left:<{width}}  {right}")


# --- nanoGPT, re-implemented -----------------------------------------------------------------------------------------
def nanogpt_class():
    """-> the model class. Inside a function so that --threads is set before torch is imported."""
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

    class LayerNorm(nn.Module):
        def __init__(self, width, bias):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))
            self.bias = nn.Parameter(torch.zeros(width)) if bias else None

        def forward(self, x):
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)

    class Attention(nn.Module):
        def __init__(self, n_head, width, bias, dropout):
            super().__init__()
            self.c_attn = nn.Linear(width, 3 * width, bias=bias)
            self.c_proj = nn.Linear(width, width, bias=bias)
            self.resid_dropout = nn.Dropout(dropout)
            self.n_head, self.width, self.dropout = n_head, width, dropout

        def forward(self, x):
            B, T, C = x.size()
            q, k, v = self.c_attn(x).split(self.width, dim=2)
            k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=True,
                                               dropout_p=self.dropout if self.training else 0)
            y = y.transpose(1, 2).contiguous().view(B, T, C)
            return self.resid_dropout(self.c_proj(y))

    class MLP(nn.Module):
        def __init__(self, width, bias, dropout, gelu):
            super().__init__()
            self.c_fc = nn.Linear(width, 4 * width, bias=bias)
            self.gelu = gelu
            self.c_proj = nn.Linear(4 * width, width, bias=bias)
            self.dropout = nn.Dropout(dropout)

        def forward(self, x):
            return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))

    class Block(nn.Module):
        def __init__(self, n_head, width, bias, dropout, gelu):
            super().__init__()
            self.ln_1 = LayerNorm(width, bias)
            self.attn = Attention(n_head, width, bias, dropout)
            self.ln_2 = LayerNorm(width, bias)
            self.mlp = MLP(width, bias, dropout, gelu)

        def forward(self, x):
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    class NanoGPT(nn.Module):
        def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, bias=False, dropout=0.0, gelu=None):
            super().__init__()
            gelu = gelu or nn.GELU()  # the exact form, with erf
            self.block_size = block_size
            self.transformer = nn.ModuleDict(dict(
                wte=nn.Embedding(vocab_size, n_embd), wpe=nn.Embedding(block_size, n_embd), drop=nn.Dropout(dropout),
                h=nn.ModuleList(Block(n_head, n_embd, bias, dropout, gelu) for _ in range(n_layer)),
                ln_f=LayerNorm(n_embd, bias)))
            self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
            self.transformer.wte.weight = self.lm_head.weight
            for name, p in self.named_parameters():
                if p.dim() >= 2:
                    nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02)
                elif name.endswith("bias"):
                    nn.init.zeros_(p)

        def forward(self, idx, targets=None):
            pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
            x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
            for block in self.transformer.h:
                x = block(x)
            x = self.transformer.ln_f(x)
            if targets is None:
                return self.lm_head(x[:, [-1], :]), None  # generation scores the last position only
            logits = self.lm_head(x)
            return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

        @torch.no_grad()
        def generate(self, idx, max_new_tokens):
            """Its loop has no cache: every token is a full pass. It samples; argmax stands in, so that runs compare."""
            for _ in range(max_new_tokens):
                context = idx if idx.size(1) <= self.block_size else idx[:, -self.block_size:]
                logits, _ = self(context)
                idx = torch.cat((idx, logits[:, -1, :].argmax(-1, keepdim=True)), dim=1)
            return idx

    return NanoGPT


class NanoGPTTraining:
    """nanoGPT's train.py on a CPU: 4 layers, 4 heads, 128 wide, block 64, batch 12, dropout 0, no compile."""

    def __init__(self, ids, vocab_size, folder, block_size=64, batch_size=12, max_iters=2000):
        import numpy as np
        import torch
        self.block_size, self.batch_size, self.max_iters = block_size, batch_size, max_iters
        self.file = Path(folder) / "train.bin"  # prepare.py writes the ids as 16-bit numbers
        np.array(ids, dtype=np.uint16).tofile(self.file)
        torch.manual_seed(1337)
        self.model = nanogpt_class()(vocab_size, block_size, n_layer=4, n_head=4, n_embd=128)
        self.model.train()
        params = list(self.model.parameters())
        groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
                  {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
        # Fused on CUDA only: on a CPU it passes no `fused` at all and gets PyTorch's default loop.
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.iter, self.loss = 0, math.nan

    def get_batch(self):
        import numpy as np
        import torch
        data = np.memmap(self.file, dtype=np.uint16, mode="r")  # opened anew for each batch: a leak otherwise
        ix = torch.randint(len(data) - self.block_size, (self.batch_size,))
        x = torch.stack([torch.from_numpy(data[i:i + self.block_size].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(data[i + 1:i + 1 + self.block_size].astype(np.int64)) for i in ix])
        return x, y

    def lr(self, it, warmup=100, high=1e-3, low=1e-4):
        if it < warmup:
            return high * (it + 1) / (warmup + 1)
        done = min(1.0, (it - warmup) / (self.max_iters - warmup))
        return low + 0.5 * (1.0 + math.cos(math.pi * done)) * (high - low)

    def run(self, steps):
        """-> seconds for `steps` iterations; evaluations and checkpoints, which both loops have, are left out."""
        import torch
        x, y = self.get_batch()
        began = time.perf_counter()
        for _ in range(steps):
            lr = self.lr(self.iter)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            _, loss = self.model(x, y)
            x, y = self.get_batch()  # the next batch, while a GPU would still be busy with this one
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            if self.iter % 10 == 0:
                self.loss = loss.item()
            self.iter += 1
        return time.perf_counter() - began


# --- decoder_only.py -------------------------------------------------------------------------------------------------
def training_step(m, rounds, steps, folder):
    """Milliseconds per optimizer step, ours and nanoGPT's, on the same characters."""
    import torch
    text, name = corpus()
    cfg = m.Config(data=name, out=folder, device="cpu", max_steps=steps + 2, eval_every=10 ** 9)
    train_rows, val_rows, tokenizer, *_ = m.make_data(cfg)
    cfg = m.dataclasses.replace(cfg, vocab_size=tokenizer.n_vocab)
    torch.manual_seed(0)
    ours, draw = m.GPT(cfg), m.get_batch
    # Evaluations and checkpoints, which both loops have, are left out.
    m.evaluate, m.save_checkpoint = lambda *_: 0.0, lambda *_, **__: None
    theirs = NanoGPTTraining(tokenizer.encode(text[:int(0.9 * len(text))]), tokenizer.n_vocab, folder)
    last = {}

    def our_steps():
        # train() itself, whole: progress bar and history. get_batch opens every step, so the time from its 2nd call to
        # call 2 + steps holds just that many; step 1, which also sets up the optimizer's state and prints, is outside,
        # like the construction of the optimizer in the other loop.
        stamps = {}

        def stamped(data, rows, seed, step):
            stamps[step] = time.perf_counter()
            return draw(data, rows, seed, step)
        m.get_batch = stamped
        last["loss"] = m.train(ours, cfg, train_rows, val_rows, tokenizer.spec)[-1]["loss"]
        return stamps[2 + steps] - stamps[2]

    seconds = take_turns({"ours": our_steps, "nanogpt": lambda: theirs.run(steps)}, rounds)
    milliseconds = {name: statistics.median(times) / steps * 1000 for name, times in seconds.items()}
    return {"data": name, "rounds": rounds, "steps_per_round": steps,
            "parameters": {"ours": sum(p.numel() for p in ours.parameters()),
                           "nanogpt": sum(p.numel() for p in theirs.model.parameters())},
            "milliseconds_per_step": milliseconds,
            "tokens_per_second": {name: 12 * 64 / ms * 1000 for name, ms in milliseconds.items()},
            "milliseconds_per_round": {name: [t / steps * 1000 for t in times] for name, times in seconds.items()},
            "time_ratio_ours_to_nanogpt": 1 / times_faster(seconds, "ours", "nanogpt"),
            # Not a comparison of quality (the learning rates differ): it shows that both really train.
            "last_loss": {"ours": last["loss"], "nanogpt": theirs.loss},
            "dtype": str(next(ours.parameters()).dtype).removeprefix("torch.")}


def generation(m, rounds, new_tokens, folder):
    """Tokens per second, batch 1, greedy, the same weights: our generate, nanoGPT's, transformers' with its cache."""
    import torch
    import torch.nn as nn
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Wide weights: with small random ones the best two logits nearly tie, and rounding would choose the tokens.
    torch.manual_seed(0)
    ours = m.GPT(m.Config(vocab_size=65, block_size=320, device="cpu")).eval()
    for p in ours.parameters():
        p.data *= 3.4 if p.dim() == 2 else 1.0
    # nanoGPT with GPT-2's biases and tanh GELU, so that the same weights mean the same model.
    nano = nanogpt_class()(65, 320, 4, 4, 128, bias=True, gelu=nn.GELU(approximate="tanh")).eval()
    nano.load_state_dict(ours.state_dict())
    m.save_pretrained(ours, Path(folder) / "hf")
    hf = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "hf").eval()
    prompt, out = torch.randint(65, (1, 16), generator=torch.Generator().manual_seed(0)), {}
    mask = torch.ones_like(prompt)

    def with_ours():
        out["ours"] = m.generate(ours, prompt, new_tokens)

    def with_nanogpt():
        out["nanogpt"] = nano.generate(prompt, new_tokens)[:, prompt.size(1):]

    def with_transformers():
        out["transformers"] = hf.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, use_cache=True,
                                          min_new_tokens=new_tokens, do_sample=False,
                                          pad_token_id=0)[:, prompt.size(1):]

    seconds = take_turns({"ours": timed(with_ours), "nanogpt": timed(with_nanogpt),
                          "transformers": timed(with_transformers)}, rounds)
    assert all(ids.shape == (1, new_tokens) for ids in out.values()), "somebody stopped early: nothing to compare"
    return {"new_tokens": new_tokens, "rounds": rounds, "transformers_version": transformers.__version__,
            "tokens_per_second": {name: new_tokens / statistics.median(times) for name, times in seconds.items()},
            "times_faster_than_nanogpt": times_faster(seconds, "ours", "nanogpt"),
            "times_faster_than_transformers": times_faster(seconds, "ours", "transformers"),
            "same_tokens_as_ours": {name: torch.equal(out["ours"], out[name]) for name in ("nanogpt", "transformers")}}


def decoder_only(args):
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    m = load_script("decoder_only")
    rounds, results = args.rounds or 30, {}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            results["training_step"] = training_step(m, rounds, args.steps, folder)
        step = results["training_step"]
        ms, share = step["milliseconds_per_step"], step["time_ratio_ours_to_nanogpt"]
        print_table(f"Training step, 4 layers, 4 heads, 128 wide, 12 x 64 tokens, {step['data']}, float32", [
            ("ours (decoder_only.train)", f"{ms['ours']:8.2f} ms   {step['tokens_per_second']['ours']:8,.0f} tokens/s"),
            ("nanoGPT's loop", f"{ms['nanogpt']:8.2f} ms   {step['tokens_per_second']['nanogpt']:8,.0f} tokens/s"),
            ("ours / nanoGPT", f"{share:8.3f} of its time")])
        try:
            import transformers  # noqa: F401
        except ImportError:
            print("\ngeneration: skipped, transformers is not installed")
            return results
        results["generation"] = made = generation(m, rounds, 256, folder)
    rate, same = made["tokens_per_second"], made["same_tokens_as_ours"]
    print_table("Greedy generation, 256 new tokens, batch 1, the same model with 320 positions", [
        ("ours, cached", f"{rate['ours']:8.1f} tokens/s"),
        ("nanoGPT, no cache", f"{rate['nanogpt']:8.1f} tokens/s   ours is "
                              f"{made['times_faster_than_nanogpt']:.2f} x as fast   same tokens: {same['nanogpt']}"),
        ("transformers, cached", f"{rate['transformers']:8.1f} tokens/s   ours is "
                                 f"{made['times_faster_than_transformers']:.2f} x as fast   "
                                 f"same tokens: {same['transformers']}")])
    return results


# --- minbpe, re-implemented ------------------------------------------------------------------------------------------
def minbpe_stats(ids, counts):
    for pair in zip(ids, ids[1:], strict=False):
        counts[pair] = counts.get(pair, 0) + 1
    return counts


def minbpe_merge(ids, pair, new):
    out, i = [], 0
    while i < len(ids):
        if ids[i] == pair[0] and i < len(ids) - 1 and ids[i + 1] == pair[1]:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def minbpe_train(text, vocab_size, pattern):
    """RegexTokenizer.train: every piece of the text is a list; each merge counts all of them and rebuilds all of them.

    -> (merges, how many ids the text ended with). Among equal counts the pair that was met first wins.
    """
    import regex
    ids = [list(piece.encode("utf-8")) for piece in regex.findall(regex.compile(pattern), text)]
    merges, vocab = [], {i: bytes([i]) for i in range(256)}
    for new in range(256, vocab_size):
        counts = {}
        for piece in ids:
            minbpe_stats(piece, counts)
        pair = max(counts, key=counts.get)
        ids = [minbpe_merge(piece, pair, new) for piece in ids]
        merges.append(pair)
        vocab[new] = vocab[pair[0]] + vocab[pair[1]]
    return merges, sum(map(len, ids))


def hf_train(text, vocab_size):
    """Hugging Face tokenizers (Rust) on the same text, with a byte-level alphabet and GPT-4's pattern. -> its version.

    The pattern is the plain form: its regex engine reads {1,3}+ as "one or more times", not as possessive.
    """
    import tokenizers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    assert tokenizer.get_vocab_size() == vocab_size
    return tokenizers.__version__


def bpe_tokenizer(args):
    m = load_script("bpe_tokenizer")
    text, name = corpus()
    part, size = text[:200_000], len(text.encode())
    results, rounds, kept = {"data": name}, args.rounds or 3, {}

    # 1. 256 merges on 200,000 characters. No warm-up round: it would cost minbpe a dozen seconds, and plain Python code
    #    has nothing to warm up but its imports, which the short call here takes care of.
    m.train_bpe(part[:1000], 300)

    def with_ours():
        kept["ours"] = [tuple(pair) for pair in m.train_bpe(part, 512)]

    def with_minbpe():
        kept["minbpe"] = minbpe_train(part, 512, m.PATTERNS["gpt4"])

    seconds = take_turns({"ours": timed(with_ours), "minbpe": timed(with_minbpe)}, rounds, warm_up=False)
    merges, (their_merges, their_length) = kept["ours"], kept["minbpe"]
    part_bytes = len(part.encode())
    results["train_512"] = first = {
        "characters": len(part), "rounds": rounds,
        "seconds": {who: statistics.median(times) for who, times in seconds.items()}, "seconds_per_round": seconds,
        "times_faster_than_minbpe": times_faster(seconds, "ours", "minbpe"),
        # The tie rules differ (smallest pair / first met), so the lists may; the compression should not.
        "bytes_per_token": {"ours": part_bytes / len(m.BPE(merges).encode_ordinary(part)),
                            "minbpe": part_bytes / their_length},
        "same_merges": sum(a == b for a, b in zip(merges, their_merges, strict=False)),
        "merges": {"ours": len(merges), "minbpe": len(their_merges)}}
    print_table(f"Training to 512 ids on {len(part):,} characters of {name}", [
        (label, f"{first['seconds'][who]:9.3f} s   {first['bytes_per_token'][who]:.4f} bytes per token")
        for label, who in (("ours (bpe_tokenizer.train_bpe)", "ours"), ("minbpe's algorithm", "minbpe"))]
        + [("minbpe / ours", f"{first['times_faster_than_minbpe']:9.1f} x")])

    # 2. 4,096 merges on the whole text, which minbpe would need many minutes for; Hugging Face's trainer in Rust.
    def ours_large():
        kept["large"] = m.train_bpe(text, 256 + 4096)

    contenders = {"ours": timed(ours_large)}
    try:
        import tokenizers  # noqa: F401

        def with_hf():
            kept["hf"] = hf_train(text, 256 + 4096)

        contenders["tokenizers"] = timed(with_hf)
    except ImportError:
        print("\nHugging Face tokenizers is not installed: left out")
    seconds = take_turns(contenders, rounds)
    results["train_4096_merges"] = large = {
        "characters": len(text), "rounds": rounds, "merges": len(kept["large"]),
        "seconds": {who: statistics.median(times) for who, times in seconds.items()}, "seconds_per_round": seconds}
    rows = [("ours, pure Python", f"{large['seconds']['ours']:9.3f} s")]
    if "tokenizers" in seconds:
        large["tokenizers_version"] = kept["hf"]
        large["time_ratio_ours_to_tokenizers"] = 1 / times_faster(seconds, "ours", "tokenizers")
        rows += [("Hugging Face tokenizers, Rust", f"{large['seconds']['tokenizers']:9.3f} s"),
                 ("ours / tokenizers", f"{large['time_ratio_ours_to_tokenizers']:9.2f} of its time")]
    print_table(f"{large['merges']:,} merges on {len(text):,} characters", rows)

    # 3. Encoding the whole text with those merges: our Python, and the same merges handed to tiktoken.
    tokenizer = m.BPE(kept["large"])
    fast = tokenizer.to_tiktoken()

    def encode_ours():
        # A fresh object for each round, so that a cache from the round before does not answer.
        fresh = m.BPE(kept["large"])
        began = time.perf_counter()
        kept["ids"] = fresh.encode_ordinary(text)
        return time.perf_counter() - began

    def encode_tiktoken():
        began = time.perf_counter()
        kept["fast_ids"] = fast.encode_ordinary(text)
        return time.perf_counter() - began

    seconds = take_turns({"ours": encode_ours, "tiktoken": encode_tiktoken}, max(5, rounds))
    results["encode"] = encode = {
        "bytes": size, "vocabulary": tokenizer.n_vocab, "bytes_per_token": size / len(kept["ids"]),
        "same_ids": list(kept["ids"]) == list(kept["fast_ids"]),
        "megabytes_per_second": {who: size / 1e6 / statistics.median(times) for who, times in seconds.items()},
        "tiktoken_times_faster": times_faster(seconds, "tiktoken", "ours")}
    speed = encode["megabytes_per_second"]
    print_table(f"Encoding {size / 1e6:.2f} MB, {encode['bytes_per_token']:.3f} bytes per token, one thread", [
        ("ours, pure Python", f"{speed['ours']:9.2f} MB/s"),
        ("our merges in tiktoken", f"{speed['tiktoken']:9.2f} MB/s   same ids: {encode['same_ids']}")])
    return results


# --- encoder_only ----------------------------------------------------------------------------------------------------
def stepper(model, loss_of, lr=1e-4):
    """-> function() that makes one optimizer step (fused AdamW, gradient clipped) and returns its seconds."""
    import torch
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)

    def step():
        began = time.perf_counter()
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    return step


def several(step, steps):
    """-> function() that makes `steps` steps and returns the seconds of all."""
    return lambda: sum(step() for _ in range(steps))


def encoder_only(args):
    """One training step on masked tokens, the same noise for both, against BertForMaskedLM."""
    import torch
    import transformers
    m = load_script("encoder_only")
    rounds, steps = args.rounds or 10, min(args.steps, 3)
    B, T, V = 32, 128, 30522
    ours = m.BERT(m.Config(n_layer=4, n_head=4, n_embd=256, vocab_size=V, block_size=T, dropout=0.1)).train()
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=V, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        max_position_embeddings=T)).train()
    ids = torch.randint(1000, V, (B, T), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 101, 102
    noisy, targets = m.mask_tokens(ids, 0.15, 103, V, torch.Generator().manual_seed(1))
    targets[:, 0] = m.IGNORE  # no label

    def our_loss():
        return m.compute_loss(ours, noisy, torch.zeros_like(ids), targets) / (targets != m.IGNORE).sum()

    def their_loss():
        return theirs(input_ids=noisy, attention_mask=torch.ones_like(ids), labels=targets).loss

    # The same function: with equal weights and without dropout both losses agree.
    ours.load_state_dict({name: t for name, t in theirs.state_dict().items() if "decoder" not in name}, strict=False)
    ours.eval(), theirs.eval()
    difference = abs(our_loss().item() - their_loss().item())
    ours.train(), theirs.train()
    seconds = take_turns({"ours": several(stepper(ours, our_loss), steps),
                          "transformers": several(stepper(theirs, their_loss), steps)}, rounds)
    ratio = 1 / times_faster(seconds, "ours", "transformers")
    hidden = int((targets != m.IGNORE).sum())
    print_table(f"Masked-token training step, {B} x {T}, V {V:,}, 4 layers x 256, {hidden} of {B * T} tokens hidden", [
        ("ours, head at the hidden tokens", f"{statistics.median(seconds['ours']) / steps:8.3f} s"),
        ("transformers, head at all tokens", f"{statistics.median(seconds['transformers']) / steps:8.3f} s"),
        ("ours / transformers", f"{ratio:8.3f} of its time   (losses differ by {difference:.1e})")])
    return {"training_step": {"batch": B, "tokens": T, "vocabulary": V, "hidden_tokens": hidden, "rounds": rounds,
                              "steps": steps, "loss_difference": difference, "transformers": transformers.__version__,
                              "seconds_per_round": seconds, "time_ratio_ours_to_transformers": ratio,
                              "logit_bytes": {"ours": 4 * hidden * V, "transformers": 4 * B * T * V}}}


# --- encoder_decoder -------------------------------------------------------------------------------------------------
def encoder_decoder(args):
    """Beam search with 4 beams on a model of 10 million parameters, and a training step, against transformers' T5."""
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    m = load_script("encoder_decoder")
    rounds = args.rounds or 10
    results, rows = {"transformers": transformers.__version__, "rounds": rounds, "beam_search": []}, []
    # Two ways to spend 10 million parameters: wide, where matrix products dominate, and deep, where calls do.
    for layers, width, vocabulary in ((8, 192, 8_000), (4, 256, 10_000)):
        ours = m.T5(m.Config(n_layer=layers, n_head=4, n_embd=width, head_size=width // 4, ffn_size=4 * width,
                             vocab_size=vocabulary))
        with torch.no_grad():  # a wider table gives distributions with clear winners, as a trained model has
            ours.shared.weight *= 4
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            m.save_pretrained(ours, folder)
            theirs = transformers.T5ForConditionalGeneration.from_pretrained(folder)
        ours.eval(), theirs.eval()
        parameters = sum(p.numel() for p in ours.parameters())
        label = f"{parameters / 1e6:.1f} M parameters, {layers} + {layers} layers x {width}"
        for B in (1, 16):
            source = torch.randint(3, vocabulary, (B, 32), generator=torch.Generator().manual_seed(B))
            kept = {}

            def with_ours(source=source, kept=kept, ours=ours):
                kept["ours"] = m.beam_search(ours, source, 64, num_beams=4)

            def with_transformers(source=source, kept=kept, theirs=theirs):
                with torch.no_grad():
                    kept["theirs"] = theirs.generate(source, attention_mask=torch.ones_like(source), num_beams=4,
                                                     max_new_tokens=64, do_sample=False, eos_token_id=1, pad_token_id=0,
                                                     return_dict_in_generate=True, output_scores=True)

            seconds = take_turns({"ours": timed(with_ours), "transformers": timed(with_transformers)}, rounds)
            mine, their_ids = kept["ours"][0][:, 0], kept["theirs"].sequences[:, 1:]
            written = int((mine == 1).cumsum(1).eq(0).sum())  # up to each row's end
            faster = times_faster(seconds, "ours", "transformers")
            same = mine.shape == their_ids.shape and bool(torch.equal(mine, their_ids))
            results["beam_search"].append({
                "label": label, "parameters": parameters, "sources": B, "beams": 4, "new_tokens": written,
                "same_tokens": same, "times_faster_than_transformers": faster,
                "score_difference": (kept["ours"][1][:, 0] - kept["theirs"].sequences_scores).abs().max().item(),
                "tokens_per_second": {who: written / statistics.median(taken) for who, taken in seconds.items()},
                "seconds_per_round": seconds})
            rows += [(f"{label}, {B} sources: {who}", f"{written / statistics.median(taken):9.1f} tokens/s")
                     for who, taken in seconds.items()]
            rows.append(("  ours is", f"{faster:9.2f} times as fast, same tokens: {same}"))
    print_table("Beam search, 4 beams", rows)

    # Training: one step on 32 x (32 -> 32) tokens.
    source, targets = (torch.randint(3, 10_000, (32, 32), generator=torch.Generator().manual_seed(i)) for i in (8, 9))
    ours.train(), theirs.train()

    def our_loss():
        return m.compute_loss(ours, source, targets) / targets.numel()

    def their_loss():
        return theirs(input_ids=source, attention_mask=torch.ones_like(source), labels=targets).loss

    steps = min(args.steps, 5)
    theirs.config.dropout_rate = 0.0
    seconds = take_turns({"ours": several(stepper(ours, our_loss), steps),
                          "transformers": several(stepper(theirs, their_loss), steps)}, rounds)
    results["training_step"] = {"time_ratio_ours_to_transformers": 1 / times_faster(seconds, "ours", "transformers"),
                                "steps": steps, "seconds_per_round": seconds}
    print_table("Training step, 32 x (32 -> 32) tokens", [
        (who, f"{statistics.median(taken) / steps:8.3f} s") for who, taken in seconds.items()])
    return results


# --- llama3 ----------------------------------------------------------------------------------------------------------
def llama3(args):
    """Cached greedy decoding against transformers' generate: 10 million and 125 million parameters, batch 1 and 8."""
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    m = load_script("llama3")
    results, rows = {"transformers": transformers.__version__, "decoding": []}, []
    for sizes, new, rounds in ((dict(n_layer=6, n_head=8, n_kv_head=4, n_embd=320, ffn_size=896, vocab_size=4096), 128,
                                args.rounds or 10),
                               (dict(n_layer=12, n_head=12, n_kv_head=4, n_embd=768, ffn_size=2048, vocab_size=32_000),
                                32, args.rounds or 5)):
        torch.manual_seed(1337)
        ours = m.Llama(m.Config(**sizes, block_size=512))
        with torch.no_grad():  # wide weights: no two tokens are nearly as likely, so rounding decides nothing
            for weight in ours.parameters():
                weight.mul_(2 if weight.dim() == 2 else 1)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            m.save_pretrained(ours, folder)
            theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
        ours.eval(), theirs.eval()
        parameters = sum(p.numel() for p in ours.parameters())
        for B in (1, 8):
            ids = torch.randint(3, sizes["vocab_size"], (B, 32), generator=torch.Generator().manual_seed(B))
            kept = {}

            def with_ours(ids=ids, kept=kept, ours=ours, new=new):
                kept["ours"] = m.generate(ours, ids, new)

            def with_transformers(ids=ids, kept=kept, theirs=theirs, new=new):
                with torch.no_grad():
                    kept["theirs"] = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                                                     min_new_tokens=new, do_sample=False, pad_token_id=0)[:, 32:]

            seconds = take_turns({"ours": timed(with_ours), "transformers": timed(with_transformers)}, rounds)
            faster = times_faster(seconds, "ours", "transformers")
            same = bool(torch.equal(kept["ours"], kept["theirs"]))
            results["decoding"].append({
                "parameters": parameters, "rows": B, "new_tokens": new, "same_tokens": same, "sizes": sizes,
                "times_faster_than_transformers": faster, "seconds_per_round": seconds,
                "tokens_per_second": {who: B * new / statistics.median(taken) for who, taken in seconds.items()}})
            label = f"{parameters / 1e6:.1f} M parameters, {B} rows"
            rows += [(f"{label}: {who}", f"{B * new / statistics.median(taken):9.1f} tokens/s")
                     for who, taken in seconds.items()]
            rows.append(("  ours is", f"{faster:9.2f} times as fast, same tokens: {same}"))
    print_table("Cached greedy decoding", rows)

    # What a comment of the scripts claims: one row times GPT-2's head, doubled or as it is.
    heads, row = [torch.randn(50257, 768) for _ in range(2)], torch.randn(1, 1, 768)  # two: none stays in a cache
    with torch.inference_mode():
        seconds = take_turns({"ours": timed(lambda: [m.linear(row, head) for head in heads]),
                              "F.linear": timed(lambda: [torch.nn.functional.linear(row, head) for head in heads])}, 20)
    results["one_row_times_a_head"] = {"shape": [50257, 768], "seconds_per_round": seconds,
                                       "times_faster_than_linear": times_faster(seconds, "ours", "F.linear")}
    print_table("One row times GPT-2's head", [
        ("linear(x, weight)", f"{results['one_row_times_a_head']['times_faster_than_linear']:9.2f} times as fast")])
    return results


# --- kv_cache --------------------------------------------------------------------------------------------------------
def kv_cache(args):
    """One token at a time, 125M shape, one row: the rungs against transformers' generate and the memory bandwidth."""
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    m = load_script("kv_cache")
    rounds, new, prompt = args.rounds or 9, 64, 32
    cfg = m.Config(**m.PRESETS["125m"], device="cpu")
    torch.manual_seed(0)
    ours = m.Llama(cfg).requires_grad_(False).eval()
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.n_embd, intermediate_size=cfg.ffn_size, rms_norm_eps=1e-5,
        num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_kv_head,
        rope_theta=10_000.0, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(3, cfg.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(1))
    models = {"growing": ours, "static": ours, "compiled": m.twin(ours, compiled=True),
              "int8": m.twin(ours, int8=True, compiled=True)}
    kinds, kept = {"growing": m.GrowingStore}, {}

    def with_ours(rung):
        def run():
            # Reading the prompt is not what is compared: decoding alone is timed, on both sides.
            cache, one = m.Cache(models[rung], kinds.get(rung, m.StaticStore), 1, prompt + new), torch.ones(1).long()
            tokens = [m.read(models[rung], ids, cache, prompt * one).argmax(-1)]
            began = time.perf_counter()
            for _ in range(new - 1):
                tokens.append(m.read(models[rung], tokens[-1][:, None], cache, one).argmax(-1))
            taken = (time.perf_counter() - began) / (new - 1)
            kept[rung] = torch.stack(tokens, 1)
            return taken
        return run

    def with_transformers():
        def write(n):
            began = time.perf_counter()
            with torch.no_grad():
                out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                                      do_sample=False, pad_token_id=0)
            return out[:, prompt:], time.perf_counter() - began
        kept["transformers"], long = write(new)
        return (long - write(1)[1]) / (new - 1)

    # The bandwidth is that of the faster of two ways to read 400 MB, neither zeros: torch's sum, a compiled maximum.
    buffer = torch.randn(100_000_000)
    fastest = torch.compile(lambda x: x.abs().amax())
    ways = {"sum": buffer.sum, "compiled amax": lambda: fastest(buffer)}

    def read(way):
        def run():
            taken = []
            for _ in range(7):
                began = time.perf_counter()
                ways[way]()
                taken.append(time.perf_counter() - began)
            return statistics.median(taken)
        return run

    seconds = take_turns({**{rung: with_ours(rung) for rung in models}, "transformers": with_transformers,
                          **{way: read(way) for way in ways}}, rounds)
    reads = [min(pair) for pair in zip(*(seconds[way] for way in ways), strict=True)]
    size = {rung: m.streamed_bytes(one, prompt + new // 2, m.StaticStore) for rung, one in models.items()}
    results = {"transformers": transformers.__version__, "parameters": sum(p.numel() for p in ours.parameters()),
               "prompt": prompt, "new_tokens": new, "seconds_per_token_per_round": seconds,
               "read_gb_s": 0.4 / statistics.median(reads), "streamed_bytes": size, "rungs": {}, "products": {}}
    rows = [("memory is read at", f"{results['read_gb_s']:9.1f} GB/s"),
            ("transformers", f"{1e3 * statistics.median(seconds['transformers']):9.2f} ms a token")]
    for rung in models:
        share = statistics.median(size[rung] / taken / (4e8 / read_in)
                                  for taken, read_in in zip(seconds[rung], reads, strict=True))
        results["rungs"][rung] = {
            "times_faster_than_transformers": times_faster(seconds, rung, "transformers"), "bandwidth_fraction": share,
            "ms_per_token": 1e3 * statistics.median(seconds[rung]),
            "same_tokens": bool(torch.equal(kept[rung], kept["transformers"]))}
        one = results["rungs"][rung]
        rows.append((rung, f"{one['ms_per_token']:9.2f} ms a token, {one['times_faster_than_transformers']:.2f} times "
                           f"as fast, {share:.0%} of the bandwidth, same tokens: {one['same_tokens']}"))

    # What comments of the script claim: a few rows times 40 matrices (250 MB), as x W^T and as (W x^T)^T.
    matrices = [torch.randn(2048, 768) for _ in range(40)]
    for count in (1, 2, 5, 8):
        x = torch.randn(count, 768)
        doubled = x.repeat(1 + (count == 1), 1).t()
        taken = take_turns({
            "x W^T": timed(lambda x=x: [torch.nn.functional.linear(x, W) for W in matrices]),
            "W x^T": timed(lambda doubled=doubled: [W @ doubled for W in matrices])}, rounds)
        results["products"][count] = times_faster(taken, "W x^T", "x W^T")
        rows.append((f"a product of {count} rows", f"{results['products'][count]:9.2f} times as fast as (W x^T)^T"))
    print_table(f"Decoding, {results['parameters'] / 1e6:.0f} M parameters, one row", rows)
    return results


# --- flash_attention -------------------------------------------------------------------------------------------------
def kernel_errors(m, seed, dtype):
    """One random case on the GPU -> [(our error, PyTorch's own error in this dtype)] for out, dq, dk, dv, both against
    float64. PyTorch's own is the written-out form."""
    import random

    import torch
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    # Few head sizes and windows: the kernels are compiled anew for each.
    K, D, B = rng.choice((1, 2)), rng.choice((37, 64, 80, 128)) if seed else 256, rng.choice((1, 2))
    H, T, S = K * rng.choice((1, 4)), rng.randint(1, 600), rng.randint(1, 600)
    options = {"causal": rng.random() < 0.7, "window": rng.choice((0, 0, 1, 100))}
    if rng.random() < 0.4:
        options["keep"] = (torch.rand(B, S, generator=generator) > rng.choice((0.2, 0.9, 1.1))).cuda()
    inputs = [torch.randn(B, heads, n, D, generator=generator).to("cuda", dtype)
              for heads, n in ((H, T), (K, S), (K, S), (H, T))]

    def results(attend, dtype):
        q, k, v, g = (x.to(dtype).requires_grad_() for x in inputs)
        out = attend(q, k, v, **options)
        return [out.double(), *(x.double() for x in torch.autograd.grad(out, (q, k, v), g))]
    exact, theirs = results(m.naive_attention, torch.float64), results(m.naive_attention, dtype)
    return [((a - c).abs().max().item(), (b - c).abs().max().item())
            for a, b, c in zip(results(m.triton_attention, dtype), theirs, exact, strict=True)]


def flash_attention(args):
    """The Triton kernels: errors in random cases, and TFLOP/s beside PyTorch's FlashAttention-2, causal, bfloat16."""
    import torch
    import torch.nn.functional as F
    if not torch.cuda.is_available():
        sys.exit("error: this comparison needs a CUDA GPU")
    import triton
    from torch.nn.attention import SDPBackend, sdpa_kernel
    m = load_script("flash_attention")
    worst = {}
    for dtype, cases in ((torch.bfloat16, 60), (torch.float32, 15)):
        # FlashAttention's criterion: at most 2 x (gradients 3 x) the error of the written-out form, plus 1e-5.
        shares = [max((ours - 1e-5) / max(theirs, 1e-12) / factor for (ours, theirs), factor in zip(
            kernel_errors(m, seed, dtype), (2, 3, 3, 3), strict=True)) for seed in range(cases)]
        worst[str(dtype)] = {"cases": cases, "worst_share_of_the_bound": max(shares)}
    print("errors as a share of what is allowed:", worst, flush=True)

    def median_ms(work):
        return triton.testing.do_bench(work, warmup=20, rep=100, return_mode="median")
    rows, figures = [], []
    for D in (64, 128):
        for T in (1024, 2048, 4096, 8192, 16384):
            q, k, v, g = (torch.randn(16384 // T, 2048 // D, T, D, device="cuda", dtype=torch.bfloat16,
                                      requires_grad=True) for _ in range(4))
            operations, one = 4 * 16384 * T * 2048 / 2, {"head_size": D, "tokens": T}  # causal: half; backward 2.5 x

            def flash(q=q, k=k, v=v):
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            for who, attend in (("ours", lambda q=q, k=k, v=v: m.triton_attention(q, k, v)), ("pytorch", flash)):
                out = attend()
                with torch.no_grad():
                    one[f"{who}_forward"] = operations / median_ms(attend) / 1e9
                one[f"{who}_backward"] = 2.5 * operations / median_ms(
                    lambda out=out, q=q, k=k, v=v, g=g: torch.autograd.grad(out, (q, k, v), g, retain_graph=True)) / 1e9
            figures.append(one)
            rows.append((f"D {D}, {T} tokens", "   ".join(
                f"{way} {one[f'ours_{way}']:4.0f} TFLOP/s, {one[f'ours_{way}'] / one[f'pytorch_{way}']:.2f} x PyTorch's"
                for way in ("forward", "backward"))))
    print_table(f"Causal attention in bfloat16, {torch.cuda.get_device_name()}", rows)
    return {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__, "errors": worst, "tflops": figures,
            "measured": "causal, bfloat16, batch * tokens = 16,384, heads * D = 2,048; pytorch: SDPA, FLASH_ATTENTION"}


# --- lora_qlora ------------------------------------------------------------------------------------------------------
def lora_qlora(args):
    """One optimizer step of full fine-tuning, LoRA and QLoRA against peft's LoRA: 1,024 tokens, rank 16, two widths."""
    import peft
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    m = load_script("lora_qlora")
    rounds, B, T = args.rounds or 9, 8, 128
    results, rows = {"peft": peft.__version__, "step": []}, []
    for width, layers in ((512, 8), (1024, 3)):
        # A vocabulary that makes the head 4 % of the weights, as in an 8B Llama (6 %): its work is the same for all.
        shape = m.BASE | dict(num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4, hidden_size=width,
                              intermediate_size=3 * width, vocab_size=4 * width)
        cfg = m.Config(device="cpu", rank=16, alpha=32.0)
        torch.manual_seed(0)
        base = m.Llama(shape)
        models = {method: m.make_ready(base, method, cfg).train() for method in ("full", "lora", "qlora")}
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(
                **{key: value for key, value in shape.items() if not key.startswith("rope")}, rope_theta=1e4))
            plain.load_state_dict(base.state_dict())
            m.save_adapter(models["lora"], "", folder)
            models["peft"] = peft.PeftModel.from_pretrained(plain, folder, is_trainable=True).train()
        ids = torch.randint(shape["vocab_size"], (B, T + 1), generator=torch.Generator().manual_seed(0))
        losses = {}

        def step(who, model, ids=ids, losses=losses):
            params = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(params, lr=0.0, fused=True)  # a rate of 0: every round computes the same

            def run():
                began = time.perf_counter()
                logits = model(ids[:, :-1])
                logits = logits.logits if who == "peft" else logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses[who] = loss.item()
                return time.perf_counter() - began
            return run

        seconds = take_turns({who: step(who, model) for who, model in models.items()}, rounds)
        entry = {"parameters": sum(p.numel() for p in base.parameters()), "width": width, "layers": layers,
                 "tokens": B * T, "rank": cfg.rank, "seconds_per_round": seconds, "loss": losses,
                 "lora_to_full": 1 / times_faster(seconds, "lora", "full"),
                 "qlora_to_full": 1 / times_faster(seconds, "qlora", "full"),
                 "lora_to_peft": 1 / times_faster(seconds, "lora", "peft")}
        results["step"].append(entry)
        rows += [(f"width {width}, {layers} layers: {who}", f"{statistics.median(taken) * 1e3:8.1f} ms   "
                  f"loss {losses[who]:.6f}") for who, taken in seconds.items()]
        rows += [(f"  {name}", f"{entry[name]:8.2f} of its time") for name in
                 ("lora_to_full", "qlora_to_full", "lora_to_peft")]
    print_table(f"One step, {B * T} tokens, rank 16 beside every matrix", rows)
    return results


# --- dpo -------------------------------------------------------------------------------------------------------------
def dpo(args):
    """One DPO step against the usual loop: two models, and a forward pass each for chosen and rejected."""
    import torch
    import torch.nn.functional as F
    m = load_script("dpo")
    rounds, B, T = args.rounds or 15, 16, 64
    cfg = m.Config(device="cpu", n_layer=4, n_head=8, n_embd=256, ffn_size=768, vocab_size=4096, beta=0.3, nll=0.0)

    def model():
        torch.manual_seed(0)
        return m.SmallLlama(cfg)
    ours, theirs, reference = model().train(), model().train(), model().eval()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(4096, (B, 2, T), generator=generator)
    targets = torch.randint(4096, (B, 2, T), generator=generator)
    targets[:, :, :T // 2] = m.IGNORE
    stored = m.pair_logps(reference, inputs, targets, cfg).unbind(1)
    losses = {}

    def step(who, model, loss):
        # A rate of 0: all rounds are alike.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

        def run():
            began = time.perf_counter()
            value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[who] = value.item()
            return time.perf_counter() - began
        return run

    def logps(model, side):
        wanted = targets[:, side]
        each = model(inputs[:, side]).log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
        return (each * (wanted != m.IGNORE)).sum(-1)

    def their_loss():
        with torch.no_grad():
            ref_c, ref_r = logps(reference, 0), logps(reference, 1)
        return -F.logsigmoid(0.3 * (logps(theirs, 0) - ref_c - logps(theirs, 1) + ref_r)).mean()

    seconds = take_turns({"ours": step("ours", ours, lambda: m.preference_loss(ours, inputs, targets, *stored) / B),
                          "two models": step("two models", theirs, their_loss)}, rounds)
    results = {"parameters": sum(p.numel() for p in ours.parameters()), "pairs": B, "tokens": T,
               "loss_difference": abs(losses["ours"] - losses["two models"]), "seconds_per_round": seconds,
               "time_ratio": 1 / times_faster(seconds, "ours", "two models")}
    print_table(f"One DPO step, {results['parameters'] / 1e6:.1f} M parameters, {B} pairs of {T} tokens", [
        *((who, f"{statistics.median(taken) * 1e3:8.1f} ms   loss {losses[who]:.6f}")
          for who, taken in seconds.items()),
        ("ours / two models", f"{results['time_ratio']:8.2f} of its time")])
    return results


# --- ppo_grpo --------------------------------------------------------------------------------------------------------
def ppo_grpo(args):
    """A rollout of the default GRPO run, 64 prompts x 8 answers, against transformers' generate with the same model."""
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    m = load_script("ppo_grpo")
    rounds, cfg = args.rounds or 15, m.Config(device="cpu", right_share=1.0)
    torch.manual_seed(0)
    policy = m.SmallLlama(cfg)
    # Imitation first: answers have the lengths that they have in a run.
    m.fit(policy, cfg, m.hasty_rows(m.draw_prompts(20_000, 0, False), cfg), m.compute_loss, 300, cfg.sft_lr)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.n_embd, intermediate_size=cfg.ffn_size,
        num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_head,
        rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)).eval()
    # The same weights under other names: q, k, v and gate, up are two products here.
    weights = {"model.embed_tokens.weight": policy.embed.weight, "model.norm.weight": policy.norm.weight,
               "lm_head.weight": policy.head.weight}
    for i, block in enumerate(policy.blocks):
        q, k, v = block.qkv.weight.chunk(3)
        gate, up = block.gate_up.weight.chunk(2)
        weights |= {f"model.layers.{i}.{name}.weight": weight for name, weight in {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": block.o.weight,
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": block.down.weight,
            "input_layernorm": block.norm1.weight, "post_attention_layernorm": block.norm2.weight}.items()}
    theirs.load_state_dict(weights)
    prompts = [m.encode_toy(f"{n}=") for n in m.draw_prompts(cfg.answers // cfg.group, 0, False)
               for _ in range(cfg.group)]
    width, written = max(map(len, prompts)), {}
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    generator, lengths = torch.Generator().manual_seed(0), torch.tensor([len(prompt) for prompt in prompts])
    check = policy(ids[:8]) - theirs(ids[:8]).logits
    assert check.abs().max() < 1e-3

    def ours():
        out, starts = m.rollout(policy, prompts, cfg.block_size, m.EOS, 1.0, generator)
        written["ours"] = int(m.answer_mask(out[:, 1:], starts, m.EOS).sum())

    def with_transformers():
        with torch.no_grad():
            out = theirs.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=cfg.block_size - 4,
                                  do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
                                  eos_token_id=m.EOS)
        written["transformers"] = int((out[:, width:] != 0).sum())

    seconds = take_turns({"ours": timed(ours), "transformers": timed(with_transformers)}, rounds)
    results = {"transformers": transformers.__version__, "rows": len(prompts),
               "new_tokens": written["ours"] / len(prompts), "prompt_tokens": lengths.float().mean().item(),
               "parameters": sum(p.numel() for p in policy.parameters()), "seconds_per_round": seconds,
               "times_faster_than_transformers": times_faster(seconds, "ours", "transformers")}
    print_table(f"Rollout, {len(prompts)} answers of {results['new_tokens']:.1f} tokens in the mean", [
        *((who, f"{written[who] / statistics.median(taken):10,.0f} tokens/s") for who, taken in seconds.items()),
        ("times as fast", f"{results['times_faster_than_transformers']:10.2f}")])
    return results


# --- qwen3_moe -------------------------------------------------------------------------------------------------------
def qwen3_moe(args):
    """Forward + backward of a 2-layer mixture, 64 experts, 8 per token, against transformers' two dispatches."""
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    m = load_script("qwen3_moe")
    rounds, results, rows = args.rounds or 10, {"transformers": transformers.__version__, "step": []}, []
    cfg = m.Config(n_layer=2, n_head=4, n_kv_head=2, head_size=64, n_embd=256, n_experts=64, experts_per_token=8,
                   ffn_size=128, vocab_size=4096, block_size=128, balance="none")
    torch.manual_seed(cfg.seed)
    ours = m.Qwen3(cfg)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        m.save_pretrained(ours, folder)
        theirs = {how: transformers.Qwen3MoeForCausalLM.from_pretrained(folder, experts_implementation=how)
                  for how in ("eager", "grouped_mm")}
    for B in (4, 8, 32):
        ids = torch.randint(4096, (B, 129), generator=torch.Generator().manual_seed(B))
        losses = {}

        def step(who, loss, model, losses=losses):
            def run():
                for parameter in model.parameters():
                    parameter.grad = None
                began = time.perf_counter()
                losses[who] = loss()
                losses[who].backward()
                return time.perf_counter() - began
            return run

        def our_loss(ids=ids):
            return m.compute_loss(ours.train(), ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()

        def their_loss(how, ids=ids):
            return torch.nn.functional.cross_entropy(theirs[how].train()(ids[:, :-1]).logits.flatten(0, 1),
                                                     ids[:, 1:].flatten())

        contenders = {"ours": step("ours", our_loss, ours)}
        for how in theirs:
            contenders[how] = step(how, lambda how=how, ids=ids: their_loss(how, ids), theirs[how])
        seconds = take_turns(contenders, rounds)
        values = [loss.item() for loss in losses.values()]
        entry = {"tokens": 128 * B, "experts": 64, "experts_per_token": 8, "expert_size": 128, "width": 256,
                 "loss_difference": max(values) - min(values), "seconds_per_round": seconds,
                 "time_ratio_to_eager": 1 / times_faster(seconds, "ours", "eager"),
                 "time_ratio_to_grouped": 1 / times_faster(seconds, "ours", "grouped_mm")}
        results["step"].append(entry)
        rows += [(f"{128 * B} tokens: {who}", f"{statistics.median(taken) * 1e3:8.1f} ms")
                 for who, taken in seconds.items()]
        rows.append(("  ours / eager, ours / grouped", f"{entry['time_ratio_to_eager']:.2f}, "
                     f"{entry['time_ratio_to_grouped']:.2f} of its time, losses within {entry['loss_difference']:.0e}"))
    print_table("Forward + backward, 2 layers, 64 experts, 8 per token", rows)

    # What a comment of the script claims: the backward pass of picking rows, each of 4,096 tokens for 8 experts.
    x, token = torch.randn(4096, 256, requires_grad=True), torch.randint(4096, (4096 * 8,))
    grad = torch.randn(4096 * 8, 256)

    def backward(pick):
        def run():
            x.grad, y = None, pick()
            began = time.perf_counter()
            y.backward(grad)
            return time.perf_counter() - began
        return run

    seconds = take_turns({"index_select": backward(lambda: x.index_select(0, token)),
                          "x[token]": backward(lambda: x[token])}, 20)
    results["picking_rows_backward"] = {"tokens": 4096, "experts_per_token": 8, "seconds_per_round": seconds,
                                        "times_faster_than_indexing": times_faster(seconds, "index_select", "x[token]")}
    faster = results["picking_rows_backward"]["times_faster_than_indexing"]
    print_table("Picking rows, backward", [("index_select", f"{faster:9.2f} times as fast as x[token]")])
    return results


PEERS = {"decoder_only": decoder_only, "encoder_only": encoder_only, "encoder_decoder": encoder_decoder,
         "llama3": llama3, "qwen3_moe": qwen3_moe, "kv_cache": kv_cache, "flash_attention": flash_attention,
         "lora_qlora": lora_qlora, "dpo": dpo, "ppo_grpo": ppo_grpo, "bpe_tokenizer": bpe_tokenizer}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.add_argument("name", choices=list(PEERS), help="the script to measure")
    parser.add_argument("--threads", type=int, default=2, help="threads for everybody [2]")
    parser.add_argument("--rounds", type=int, default=0, help="turns of each contender [30; encoders 10; tokenizers 3]")
    parser.add_argument("--steps", type=int, default=50, help="training steps per round [50]")
    parser.add_argument("--json", type=Path, help="where the figures go [results/peers_NAME.json in the repository]")
    args = parser.parse_args(argv)
    if args.threads < 1 or args.rounds < 0 or args.steps < 1:
        parser.error("--threads and --steps must be at least 1, --rounds 0 or more")
    # Read by the libraries when they start, so before torch is imported. RAYON: tokenizers' threads.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[variable] = str(args.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if args.threads > 1 else "false"
    import torch
    torch.set_num_threads(args.threads)
    around = environment(args.threads)
    print(f"{around['cpu']}, {around['cores']} cores, {args.threads} threads, Python {around['python']}, "
          f"torch {around['torch']}, load {around['load_average_at_start']}")
    results = PEERS[args.name](args)
    path = args.json or ROOT / "results" / f"peers_{args.name}.json"
    write_json(path, {"benchmark": f"benchmarks/peers.py {args.name}", "environment": around, "results": results})
    print(f"\nwritten to {path.name}")


if __name__ == "__main__":
    main()
