"""Procedures and judges as people say them."""

import re


def spoken(procedure: str) -> str:
    """`best_of_4` as people say it: best-of-4."""
    return procedure.replace("_", "-")


def short_name(judge: str | None) -> str:
    """`rewards:brevity` as brevity, and a directory by its last part."""
    name = re.split(r"[:/\\]", (judge or "judge").rstrip("/"))[-1] or "judge"
    return name if len(name) <= 24 else f"{name[:23]}…"


def procedure_order(procedure: str) -> tuple[int, int]:
    """Worst-of-16 ... sampling ... best-of-16."""
    family, _, size = procedure.rpartition("_")
    n = int(size) if size.isdigit() else 1
    return (0, 0) if procedure == "sampling" else (1, n) if family.startswith("best") else (2, n)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
