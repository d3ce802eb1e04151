"""Check that two states of this repository compute the same results, bit for bit.

python benchmarks/same_results.py <commit or folder before> [<commit or folder after>] [--keep DIR]

Both train the same configurations, each in a process of its own on one CPU thread, and all files that they write are
compared. A run that the first breaks off is also finished by the second.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parents[1]
SIDES = ("before", "after")
SHORT = "--evaluate_every 1 --training.max_local_steps 2 --training.batch_size 6"
RUNS = {
    "fedra": "--rounds 2 --trace true --training.proximal_mu 0.01 --execution.lanes 4",
    "hetlora": "--rounds 2 --method.name hetlora --method.weighting samples --data.domains [clean,noisy,edges] "
    "--clients.capacities [12] --clients.ranks [8,4,1] --lora.dropout 0.1 --training.optimizer sgd --clients.sampling "
    "uniform --clients.participants 5 --data.partition quantity --execution.lanes 3 --execution.fused_blocks on",
    "depthfl": "--rounds 2 --method.name depthfl --execution.executor sequential --data.domains [clean,noisy,edges] "
    "--clients.capacities [12,9,3] --data.partition shards --server.optimizer fedavgm --data.augmentation crop_flip",
    "text": "--rounds 2 --method.name flora --data.source causal_lm --data.root ../texts.jsonl --model.path ../gpt2 "
    "--data.prompt 'q {question} a ' --data.partition iid --data.clients_per_domain 2 --data.min_samples 2 "
    "--lora.target_modules [c_attn,c_proj] --lora.rank 4 --clients.capacities [4] --training.lr 0.05",
    "devices": "--rounds 4 --method.name fedhello --method.fedhello.fisher_every 3 --method.fedhello.fisher_samples 12 "
    "--server.optimizer fedadam --clients.capacity_schedule drawn --clients.device_schedule drawn --clients.devices "
    "'[{compute: 2, upload: 20, availability: 0.8}, {compute: 0.3, upload: 4, variation: 0.5, dropout: 0.2}]' "
    "--clients.deadline 0.5 --clients.sampling uniform --clients.participants 7 --data.partition bootstrap "
    "--data.clients 1000 --training.lr_schedule constant --execution.deterministic true "
    "--execution.checkpoint_blocks true",
}
RESUMED = "devices"
ONLY_NAMED = ("run.log", "partition.png", "costs.json", "report.html")
"""Files of which only the names are compared: they have times or pixels in them."""
LEFT_OUT = ("seconds", "metrics", "tensors", "setting", "digest")
"""Values of JSON files that are not compared: times, and digests of what is compared itself or has times in it."""


def differences(before: Path, after: Path, hidden: Sequence[Path] = ()) -> list[str]:
    """What differs between two folders, one line a file; texts may name different folders of `hidden`."""
    one, other = ({str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()} for top in (before, after))
    lines = [f"{name}: only in {before if name in one else after}" for name in sorted(one ^ other)]
    for name in sorted(one & other):
        if Path(name).name in ONLY_NAMED or (before / name).read_bytes() == (after / name).read_bytes():
            continue
        old, new = (read_values(top / name, hidden) for top in (before, after))
        unequal = [key for key in old | new if old.get(key) != new.get(key)]
        if unequal:
            shown = " / ".join(str(values.get(unequal[0], "nothing"))[:80] for values in (old, new))
            lines.append(f"{name}: {len(unequal)} of {len(old | new)} differ, first {unequal[0]}: {shown}")
    return lines


def read_values(file: Path, hidden: Sequence[Path] = ()) -> dict[str, object]:
    """What is compared of `file`, by name: its tensors, its lines, or its whole content."""
    if file.suffix == ".safetensors":
        # Bytes, so that NaN equals itself and −0 does not equal 0.
        return {
            name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            for name, tensor in load_file(file).items()
        }
    if file.suffix not in (".json", ".jsonl", ".yaml", ".md"):
        return {"content": file.read_bytes()}
    text = file.read_text()
    for path in sorted(map(str, hidden), reverse=True):
        text = text.replace(path, "…")
    if file.suffix in (".json", ".jsonl"):
        records = text.splitlines() if file.suffix == ".jsonl" else [text]
        text = "\n".join(json.dumps(json.loads(each, object_hook=_compared), indent=1) for each in records)
    return {f"line {number}": line.strip() for number, line in enumerate(text.splitlines(), 1)}


def _compared(values: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if name not in LEFT_OUT}


def simulate(checkout: Path, folder: Path, options: str) -> str:
    """Run the simulator of `checkout` in `folder`. Returns nothing, or the last line with which it failed."""
    folder.mkdir(exist_ok=True)
    paths = {"PYTHONPATH": f"{checkout}:{checkout / 'kernels'}", "HF_HOME": str(folder / "cache")}
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(checkout / "launchers/simulate.py"), *shlex.split(options)]
    done = subprocess.run(command, cwd=folder, env=os.environ | paths | settings, capture_output=True, text=True)
    return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1] if done.returncode else ""


def report(title: str, before: Path, after: Path, failures: Sequence[str], hidden: Sequence[Path]) -> bool:
    """Print how two runs failed or differ. Returns whether they are equal, but for names of options."""
    found = [line for line in failures if line] or differences(before, after, hidden)
    serious = [line for line in found if not line.startswith("config.yaml: ")]
    print(f"{title}: {f'{len(serious)} differ' if serious else 'equal'}")
    for line in [*serious[:3], *(f"{line} (does not count)" for line in found if line not in serious)]:
        print(f"  {line}", flush=True)
    return not serious


def write_inputs(folder: Path) -> None:
    """Make a language model of four blocks in `<folder>/gpt2`, and questions with answers in texts.jsonl."""
    words = ["<s>", "</s>", "?", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "?", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "gpt2")
    sizes = {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32, "vocab_size": len(words)}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).save_pretrained(folder / "gpt2")
    asked = [(domain, " ".join(words[i : i + 1 + i % 3]), words[i + 3]) for domain in "xyz" for i in range(3, 23)]
    rows = (dict(zip(("domain", "question", "response"), row, strict=True)) for row in asked)
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def check_out(commit: str, folder: Path, stack: ExitStack) -> Path:
    """`commit` if it is a folder, else a worktree in `folder` with its files, which goes when `stack` does."""
    if Path(commit).is_dir():
        return Path(commit).resolve()
    worktree = ["git", "-C", str(HERE), "worktree"]
    subprocess.run([*worktree, "add", "--quiet", "--detach", str(folder), commit], check=True)
    stack.callback(subprocess.run, [*worktree, "remove", "--force", str(folder)], check=True)
    return folder


def main() -> None:
    """Compare, and exit with 1 if results differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", help="commit or folder")
    parser.add_argument("after", nargs="?", default=str(HERE), help="commit or folder; this checkout by default")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new folder in which all outputs stay")
    options = parser.parse_args()
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        work = (options.keep or temporary / "outputs").resolve()
        work.mkdir(parents=True)
        checkouts = [check_out(getattr(options, side), temporary / side, stack) for side in SIDES]
        write_inputs(work)
        equal = []
        for name, each in RUNS.items():
            command = f"--name {name} {SHORT} {each}"
            failures = [simulate(top, work / side, command) for top, side in zip(checkouts, SIDES, strict=True)]
            before, after = (work / side / "runs" / name for side in SIDES)
            equal.append(report(name, before, after, failures, checkouts))
        command = f"--name {RESUMED} {SHORT} {RUNS[RESUMED]}".replace("--rounds 4", "--rounds 2")
        run = work / "resumed/runs" / RESUMED
        failure = simulate(checkouts[0], work / "resumed", command)
        refusal = simulate(checkouts[1], work / "resumed", f"--resume {run} --rounds 4")
        if refusal and not failure:
            print(f"{RESUMED}, resumed: refused: {refusal}")
        else:
            equal.append(report(f"{RESUMED}, resumed", work / "before/runs" / RESUMED, run, [failure], checkouts))
    sys.exit(not all(equal))


if __name__ == "__main__":
    main()
