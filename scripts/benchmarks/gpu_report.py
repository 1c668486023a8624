"""Figures of the GPU benchmarks -> a page in Markdown."""

import datetime
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Case = dict[str, Any]
Figures = dict[str, Any]
Results = Sequence[tuple[Case, Figures]]


def make_page(device: Figures, results: Results, seconds: float, command: str) -> str:
    """Returns the page.

    Args:
      device: figures of the "device" case.
      results: (case, its figures or {"failed": reason}) of all other cases.
      seconds: of the whole run.
      command: that produced the results.
    """
    head = {
        "Command": f"`{command}`",
        "Date": datetime.date.today().isoformat(),
        "Versions": device["versions"],
        "Device": f"{device['count']} x {device['kind']}",
        "Time": f"{seconds / 60:.1f} min",
    }
    top = "  \n".join(f"{name}: {value}" for name, value in head.items())
    return f"""\
{top}

Dialogue lengths are log-normal with mean 400, from 16 to 2,048 tokens. Rows have no padding. Weights are random.

**Numerics**: norm of the difference from NumPy float64, relative to the norm of the float64 result, for a row of 500
tokens.

{_numerics_table(results)}

**Attention alone**: 32,768 tokens in rows of T, bfloat16. TFLOP/s count visible pairs only. The goal for packed rows:
forward and backward take at most (visible pairs / causal pairs) times as long as cuDNN's causal attention, so the last
column is at most the one before it.

{_attention_table(results)}

**Training steps**: one micro-batch, AdamW, bfloat16 products, attention selected as in training. MFU does not count
padding, masked pairs, logits without a target, or recomputation. Where weights are bfloat16, so are gradients and
moments. Goals: 45 % MFU at 1B and 8B, 35 % at 135M.

{_training_table(results)}
"""


def make_table(
    columns: Sequence[str], rows: Iterable[tuple[Sequence[Any], Figures, Callable[[Figures], list[str]]]]
) -> str:
    """Returns a Markdown table.

    Args:
      rows: (first cells, figures, function from figures to the other cells). If the figures are {"failed": reason}, one
        cell gives the reason instead.
    """
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for names, figures, make_cells in rows:
        cells = [f"not measured: {figures['failed']}"] if "failed" in figures else make_cells(figures)
        cells = [cell.replace("|", "/") for cell in [*map(str, names), *cells]]
        lines.append("| " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")
    return "\n".join(lines)


def _heads(case: Case) -> str:
    return f"{case['heads']}/{case['kv_heads']} x {case['head_dim']}"


def _numbers(*values: float | None, digits: int = 2) -> list[str]:
    return ["" if value is None else f"{value:,.{digits}f}" for value in values]


def _numerics_table(results: Results) -> str:
    errors = ("output", "dq", "dk", "dv")

    def make_cells(figures):
        return [f"{figures[name]:.1e}" for name in errors]

    columns = ("path", "rows", "type", "heads", "output", "dq", "dk", "dv")
    rows = (
        ((case["path"], case["rows"], case["dtype"], _heads(case)), figures, make_cells)
        for case, figures in results
        if case["part"] == "numerics"
    )
    return make_table(columns, rows)


def _attention_table(results: Results) -> str:
    attention = [(case, figures) for case, figures in results if case["part"] == "attention"]
    causal = {(_heads(case), case["length"]): figures for case, figures in attention if case["path"] == "cudnn_causal"}

    def rows():
        for case, figures in attention:
            base = causal.get((_heads(case), case["length"]), {"failed": ""})

            def make_cells(figures, base=base):
                ratio = None if "failed" in base else figures["both_ms"] / base["both_ms"]
                return [
                    *_numbers(figures["forward_ms"], figures["both_ms"], digits=3),
                    *_numbers(figures["forward_tflops"], figures["both_tflops"], digits=0),
                    *_numbers(figures["share"], ratio, digits=3),
                ]

            yield (case["path"], case["rows"], _heads(case), case["length"]), figures, make_cells

    columns = ("path", "rows", "heads", "T", "forward, ms", "with backward, ms", "forward, TFLOP/s")
    return make_table((*columns, "with backward, TFLOP/s", "pairs / causal's", "time / cuDNN causal's"), rows())


def _training_table(results: Results) -> str:
    def make_cells(figures):
        mfu = None if figures["mfu"] is None else 100 * figures["mfu"]
        return [
            *_numbers(figures["tokens_per_second"], figures["tflops"], digits=0),
            *_numbers(mfu, figures["peak_memory_gb"], figures["compile_seconds"], digits=1),
        ]

    names = ("model", "length", "rows", "remat", "parameter_dtype")
    rows = (([case[n] for n in names], figures, make_cells) for case, figures in results if case["part"] == "train")
    columns = ("model", "T", "rows", "remat", "weights and moments", "tokens/s", "TFLOP/s", "MFU, %")
    return make_table((*columns, "peak memory, GB", "compilation, s"), rows)
