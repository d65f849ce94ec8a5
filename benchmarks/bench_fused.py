#!/usr/bin/env python3
"""Compares ldm_fused with PyTorch on the GroupNorm calls of real diffusion models, and on the models: see --help."""

import argparse
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A tree built in place is what its developer means; otherwise an installed ldm_fused goes first.
sys.path.insert(0 if any((ROOT / "ldm_fused").glob("_C*.so")) else len(sys.path), str(ROOT))

from benchmarks import workloads  # noqa: E402  (torch is imported only when it is needed: --help answers at once)

DTYPES = ("float32", "bfloat16", "float16")
EPILOG = """\
providers, timed in turn in the same run, each checked against float64 before it is timed:
  eager      the reference as diffusion code writes it: h = norm(x); h * sigmoid(h)
  F.silu     F.silu(F.group_norm(x))
  compile    torch.compile of F.silu, for each shape anew (needs a working C++ compiler)
  ours       ldm_fused
and by --providers alone
  cooperative  torch.compile of F.silu with cooperative reductions
  triton       two passes in Triton (benchmarks/triton_group_norm.py); the op, on CUDA
  recompute    our block with recompute=True; by itself where --train runs nothing but blocks
  again        ours once more: how far a ratio is from 1 by chance

ways to run a --model, timed in turn, each with its error against float64 beside eager's
  eager, channels_last, compile    as it is; weights and input in channels_last; torch.compile, fullgraph
  patch                            ldm_fused.patch(model)
  patch+layout, +fold, +both       and memory_format=torch.channels_last, fold_upsample=True, or both
  patch+both+graph                 replayed as a CUDA graph (on CUDA, without gradients)
  patch+both+compile               then torch.compile
  patch+recompute                  recompute=True (in training)
and by --providers alone
  compile+patch+both               compiled, and called, before it is patched
  again                            patch+both once more

examples:
  bench_fused.py                                  a two-minute overview
  bench_fused.py --suite sd15-unet-512 --op       every GroupNorm of Stable Diffusion 1.5's UNet
  bench_fused.py --suite all --layout both --dtype bfloat16,float32 --json all.json
  bench_fused.py --shape 4,96,40,40 --dtype bfloat16
  bench_fused.py --model --plot model.png         a whole autoencoder
  bench_fused.py --model diffusers-vae --decode --resolution 256,512 --dtype float32,bfloat16
  bench_fused.py --model diffusers-unet --resolution 512 --providers eager,patch,patch+both
"""


def shape(text: str):
    sizes = tuple(int(size) for size in text.replace("x", ",").split(","))
    if len(sizes) < 2 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape: write N,C,H,W")
    return sizes


def provider_list(text: str):
    names, known = [name.strip() for name in text.split(",")], dict.fromkeys(workloads.PROVIDERS + workloads.WAYS)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"no provider {unknown[0]!r}: choose from {', '.join(known)}")
    return names


def resolution_list(text: str):
    sizes = text.split(",")
    if not all(size.isdecimal() and int(size) > 0 and int(size) % 8 == 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: the models need multiples of 8")
    return list(dict.fromkeys(map(int, sizes)))


def dtype_list(text: str):
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name not in DTYPES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no dtype {unknown[0]!r}: choose from {', '.join(DTYPES)}")
    return names


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Compares ldm_fused with PyTorch on the GroupNorm calls of real diffusion models, and on models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = p.add_argument_group("what to run (default: op and block, forward and training, a few shapes)")
    add = what.add_argument
    add("--op", action="store_true", help="the op: GroupNorm and SiLU")
    add("--block", action="store_true", help="the ResNet block")
    add("--model", nargs="?", const="ldm", choices=["ldm", "diffusers-vae", "diffusers-flux-vae", "diffusers-unet"],
        metavar="NAME", help="a whole model with random weights, before ldm_fused.patch and after: ldm, LDM's kl-f8"
                             " autoencoder; diffusers-vae, Stable Diffusion 1.5's and XL's; diffusers-flux-vae, FLUX's;"
                             " diffusers-unet, Stable Diffusion 1.5's; takes long on a CPU")  # fmt: skip
    add("--forward", action="store_true", help="only the forward pass, without autograd")
    add("--encode", action="store_true", help="of --model only the encoder's forward pass")
    add("--decode", action="store_true", help="of --model only the decoder's forward pass")
    add("--backward", action="store_true", help="only the backward pass, without the forward pass")
    add("--train", action="store_true", help="only forward and backward together (without either option: both, and"
                                             " training only for models that people train)")  # fmt: skip
    add("--suite", choices=[*workloads.SUITES, "all"], metavar="NAME", help="every shape of a suite, or of all")
    add("--sample", action="store_true", help="a dozen shapes of all suites, forward and backward in both layouts, some"
                                              " blocks, and some in float32: what `make gpu` times")  # fmt: skip
    add("--shape", type=shape, action="append", metavar="N,C,H,W", help="a shape of your own; repeatable")
    add("--groups", type=int, default=32, metavar="G", help="number of groups for --shape (32)")
    add("--max-mb", type=float, metavar="MB", help="leave out tensors larger than so many MB")
    add("--providers", type=provider_list, metavar="A,B", help="only these (all)")
    add("--list", action="store_true", help="print the suites and their shapes, and stop")

    add = p.add_argument_group("how").add_argument
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--dtype", type=dtype_list, dest="dtypes", metavar="A,B", help=f"of {', '.join(DTYPES)} (default: bfloat16 on"
                                                                        " cuda, float32 on cpu)")  # fmt: skip
    add("--layout", choices=["contiguous", "channels_last", "both"], default="contiguous", help="default: contiguous")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    add("--min-run-time", type=float, default=0.25, metavar="S", help="seconds to time each provider for (0.25)")
    add("--budget", type=float, metavar="S", help="start no case after so many seconds; the suites take turns, so that"
                                                  " all of them are cut alike")  # fmt: skip
    add("--fresh-memory", action="store_true", help="of the op and the block on a CPU: each result lies in memory fresh"
                                                    " from the system, with its page faults")  # fmt: skip
    add("--prepare", type=int, metavar="N", help="time nothing: compile the cases in N processes, and torch.compile's"
                                                 " cache will have them for the next run; with --budget, those that"
                                                 " there is time for")  # fmt: skip
    add("--resolution", type=resolution_list, dest="resolutions", default=[256], metavar="P,Q",
        help="heights and widths for --model (256)")  # fmt: skip

    add = p.add_argument_group("results").add_argument
    add("--csv", metavar="FILE", help="one line for each case and provider")
    add("--json", metavar="FILE", help="everything, with the machine and the versions")
    add("--plot", metavar="OUT.png", help="charts of the speed-ups, of the share of copy bandwidth, and of a model's"
                                            " memory")  # fmt: skip
    return p


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    if args.list:
        print(workloads.listing(workloads.load()))
        return 0
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes a line at each start and stop
    try:
        import torch

        from benchmarks import cases, charts, machine, model, report
    except ImportError as e:
        sys.exit(str(e))
    complete(args, torch)
    if args.plot and not charts.available():
        sys.exit("--plot needs matplotlib: pip install matplotlib")

    if args.prepare:
        print(cases.prepare(args))
        return 0

    environment = {**machine.describe(args.device), "fresh_memory": args.fresh_memory}
    print(machine.headline(environment), flush=True)
    if machine.busy():
        print(f"load average {environment['load']}: other programs are running, timings will be noisy", file=sys.stderr)
    rows, model_rows = [], []
    chosen = (len(cases.chosen(args)) if args.levels else 0) + (len(model.chosen(args)) if args.model else 0)

    def save(rows, model_rows=()) -> None:
        results = [report.as_dict(row, args.providers) for row in rows] + [row.as_dict() for row in model_rows]
        if args.json:
            report.write_json(args.json, environment, results, chosen)
        if args.csv:
            report.write_csv(args.csv, environment, results)

    if args.levels:
        rows = cases.run(args, save)
        print(cases.summary(rows, args))
    if args.model:
        model_rows = model.run(args, lambda done: save(rows, done))
        print(model.summary(model_rows, args))
    save(rows, model_rows)
    failed = sum(cell.failed for row in [*rows, *model_rows] for cell in row.cells.values())
    if args.plot:
        charts.draw(args.plot, rows, args.providers, model_rows, environment)
    if failed:
        print(f"\n{failed} failed: see above", file=sys.stderr)
    return 1 if failed else 0


def complete(args, torch) -> None:
    """Fills in what was left open, by what the machine has."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: this torch sees no GPU")
    args.dtypes = args.dtypes or ["bfloat16" if args.device == "cuda" else "float32"]
    args.levels = [level for level in ("op", "block") if getattr(args, level)]
    if not args.levels and not args.model:
        args.levels = ["op", "block"]
    asked_for, args.ways = args.providers or [], None
    if asked_for:
        args.providers = [name for name in workloads.PROVIDERS if name in asked_for]
        args.ways = [name for name in workloads.WAYS if name in asked_for]
        for kind, names in [("--model", args.ways)] * bool(args.model) + [("", args.providers)] * bool(args.levels):
            if not names:
                sys.exit(f"--providers {','.join(asked_for)}: none of them is for {kind or ' and '.join(args.levels)}")
    else:
        recomputes = args.train and not args.forward and "op" not in args.levels  # elsewhere it is ours once more
        args.providers = [name for name in workloads.PROVIDERS if name not in workloads.ON_REQUEST]
        args.providers += ["recompute"] * recomputes
    # Forward alone is run for the models that nobody trains, unless training is asked for by name.
    args.train_all = args.train and not args.forward
    asked = {"forward": args.forward, "backward": args.backward, "training": args.train}
    args.modes = [mode for mode, on in asked.items() if on]
    args.modes = args.modes or ["forward", "training"]
    if args.model and args.modes == ["backward"] and not (args.encode or args.decode):
        sys.exit("--backward is for the op and the block: a model is run with --forward, --encode, --decode or --train")
    for shape in args.shape or []:
        if args.groups < 1 or shape[1] % args.groups:
            sys.exit(f"--shape {shape}: {shape[1]} channels are no multiple of {args.groups} groups, see --groups")
    for path in filter(None, (args.csv, args.json, args.plot)):
        if not Path(path).resolve().parent.is_dir():
            sys.exit(f"{path}: there is no such folder")
    if args.threads:
        torch.set_num_threads(args.threads)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly in `| head`
    sys.exit(main())
