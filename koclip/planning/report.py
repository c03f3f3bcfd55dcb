"""A plan as tables on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """Return a number with three digits and a metric prefix: `12.3 G`."""
    for size, letter in _UNITS:
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g} "


def size(value: float) -> str:
    """Return bytes in MiB, GiB or TiB."""
    for power, unit in ((40, "TiB"), (30, "GiB")):
        if value >= 2**power:
            return f"{value / 2**power:,.2f} {unit}"
    return f"{value / 2**20:,.1f} MiB"


def show(plan: dict[str, Any], console: Console | None = None) -> None:
    """Print a plan."""
    console = console or Console()
    shape = f"{plan['image_size']} pixels, {plan['tokens']} tokens, {plan['precision']}"
    console.print(f"{plan['run']} ({plan['recipe']}): {shape}")
    console.print(_parameters(plan))
    console.print(_stages(plan))
    sizes = [f"{name.replace('_', ' ')} {size(value)}" for name, value in plan["disk"].items()]
    features = plan["features"]
    image, caption = short(features["flops_per_image"]), short(features["flops_per_caption"])
    total = plan["total"]
    numbers = [f"{short(total['pairs'])}pairs", f"{short(total['flops'])}FLOPs"]
    units = {"hours": "hours", "device_hours": "device hours", "kwh": "kWh"}
    numbers += [f"{total[name]:,.3g} {unit}" for name, unit in units.items() if name in total]
    numbers += [f"price {total['price']:,.2f}"] if "price" in total else []
    for line in (
        f"Disk: {', '.join(sizes)}",
        f"To embed an image once: {image}FLOPs, a caption: {caption}FLOPs",
        f"Total: {', '.join(numbers)}",
    ):
        console.print(line, soft_wrap=True)
    if "hours" not in total:
        console.print("For hours: --steps 20 measures on this machine; --machine FILE predicts from such measurements;")
        console.print("--device a100 takes a device of the table.")


def _parameters(plan: dict[str, Any]) -> Table:
    table = Table("part", "parameters", "trained in the last stage", title="Parameters", title_justify="left")
    for name, part in plan["parameters"].items():
        table.add_row(name.replace("_", " "), f"{part['total']:,}", f"{part['trained']:,}")
    sums = [sum(part[key] for part in plan["parameters"].values()) for key in ("total", "trained")]
    table.add_row("all", *[f"{value:,}" for value in sums], style="bold")
    return table


def _stages(plan: dict[str, Any]) -> Table:
    """Return a table with a column for each stage."""
    stages = plan["stages"]
    table = Table("per stage", *[stage["name"] for stage in stages], title="Stages", title_justify="left")
    table.add_row("steps", *[f"{stage['steps']:,}" for stage in stages])
    table.add_row("batches hold", *[f"{stage['image']}, {stage['text']}" for stage in stages])
    for name in stages[0]["flops_per_pair"]:
        table.add_row(f"FLOPs per pair: {name}", *[short(stage["flops_per_pair"][name]) for stage in stages])
    for name in stages[0]["memory"]:
        table.add_row(f"memory: {name}", *[size(stage["memory"][name]) for stage in stages])
    if "largest_micro_batch" in stages[0]:
        limit = size(stages[0]["memory_limit"])
        table.add_row(f"largest micro-batch in {limit}", *[f"{stage['largest_micro_batch']:,}" for stage in stages])
    for source in ("measured", "predicted"):
        if source in stages[0]:
            table.add_row(f"{source} peak", *[f"{stage[source]['memory_gib']:,.2f} GiB" for stage in stages])
    for name, label in (("pairs_per_second", "pairs per second"), ("hours", "hours")):
        if name in stages[0]:
            table.add_row(label, *[f"{stage[name]:,.3g}" for stage in stages])
    return table
