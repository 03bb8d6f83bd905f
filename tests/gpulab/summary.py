"""A table of launches to paste into a note."""

PARTS = (
    "dram",
    "l2",
    "l1",
    "shared",
    "issue",
    "fp32",
    "sfu",
    "sm_issue",
    "sm_l2",
    "sm_shared",
    "latency",
)


def _wide_share(widths):
    """Share of the bytes that moves in accesses of 16 bytes per lane or more."""
    total = sum(w * n for w, n in widths.items())
    return (
        f"{100 * sum(w * n for w, n in widths.items() if w >= 16) / total:.0f}%" if total else "-"
    )


def _number(value):
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _parts(lines):
    """The resources that there are figures of."""
    return [p for p in PARTS if any(f"{p}_us" in line for line in lines)]


def _row(name, r, unit, line, parts):
    efficiency = [
        f"{100 * e:.0f}%" if n else "-"
        for e, n in (
            (r.load_efficiency, r.global_load_sectors),
            (r.store_efficiency, r.global_store_sectors),
        )
    ]
    return [
        name,
        "x".join(str(g) for g in r.grid),
        r.num_warps,
        r.registers or "-",
        r.spill_bytes,
        _wide_share(r.load_widths),
        _wide_share(r.store_widths),
        *efficiency,
        f"{r.dram_read_bytes / unit:.3f}",
        f"{r.dram_write_bytes / unit:.3f}",
        f"{r.bank_conflict_ratio:.2f}" if r.shared_requests else "-",
        r.atomic_requests,
        *[_number(line.get(f"{part}_us", 0)) for part in parts],
        _number(line["bound_us"]),
        line["binds"],
    ]


def summary_text(reports, tensor_bytes=None):
    """The table as a string; see ``summary``."""
    lab = reports if hasattr(reports, "reports") else None
    reports = lab.reports if lab else [reports] if hasattr(reports, "kernel") else list(reports)
    if not reports:
        return "no launches"
    unit, name = (tensor_bytes, "T") if tensor_bytes else (1e6, "MB")
    lines = [r.roofline() for r in reports]
    parts = _parts(lines)
    head = [
        "kernel",
        "grid",
        "warps",
        "regs",
        "spill B",
        "ld 16B",
        "st 16B",
        "ld eff",
        "st eff",
        f"read {name}",
        f"write {name}",
        "bank",
        "atomics",
        *[f"{p} us" for p in parts],
        "bound us",
        "binds",
    ]
    rows = [
        _row(f"{i} {r.kernel}", r, unit, line, parts)
        for i, (r, line) in enumerate(zip(reports, lines, strict=False))
    ]
    dirty = reports[-1].l2_dirty_bytes
    read = sum(r.dram_read_bytes for r in reports)
    written = lab.dram_write_bytes if lab else sum(r.dram_write_bytes for r in reports) + dirty
    total = [
        f"total of {len(reports)}",
        "",
        "",
        "",
        sum(r.spill_bytes for r in reports),
        "",
        "",
        "",
        "",
        f"{read / unit:.3f}",
        f"{written / unit:.3f}",
        "",
        sum(r.atomic_requests for r in reports),
        *[_number(sum(line.get(f"{p}_us", 0) for line in lines)) for p in parts],
        _number(sum(line["bound_us"] for line in lines)),
        "",
    ]
    table = [[str(cell) for cell in row] for row in [head, *rows, total]]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    text = [
        "| "
        + " | ".join(
            c.ljust(w) if i in (0, len(head) - 1) else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=False))
        )
        + " |"
        for row in table
    ]
    text.insert(
        1,
        "|"
        + "|".join(
            "-" * (w + 1) + ("-" if i in (0, len(head) - 1) else ":") for i, w in enumerate(widths)
        )
        + "|",
    )
    device = reports[0].device
    text += [
        "",
        f"{device.name}, L2 {device.l2_bytes / 2**20:.1f} MiB"
        + (
            f" = {device.l2_bytes / tensor_bytes:.2f} T, T = {tensor_bytes / 1e6:.2f} MB"
            if tensor_bytes
            else ""
        )
        + f"; the total of the writes includes {dirty / unit:.3f} {name} still dirty in the L2; "
        "times are lower bounds (work / peak rate, of the device or of the busiest SM; "
        "latency: longest chain of instructions), not timings",
    ]
    return "\n".join(text)


def summary(reports, tensor_bytes=None):
    """Print one row per launch and the totals: a list of Reports, one Report, or what ``intercept``
    yields.

    DRAM traffic is in units of ``tensor_bytes`` (T), or MB without it.
    """
    print(summary_text(reports, tensor_bytes))
