# SPDX-License-Identifier: Apache-2.0
"""The summary in Markdown: for an issue, a pull request, the notes of a release."""

from __future__ import annotations

SHOWN = (
    "bench",
    "variants",
    "bench-peak",
    "break-even",
    "model",
    "ttft",
)  # whose printed numbers belong into the summary


def tables(output: str, lines: int = 60) -> str:
    """The end of an output, from the start of a line."""
    return "\n".join(output.strip().splitlines()[-lines:])


def heading(report: dict) -> str:
    gpu = report["gpu"]
    memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in gpu else "memory unknown"
    commit = report["commit"] or "unknown"
    commit += " + uncommitted changes" if report["uncommitted"] else ""
    return (
        f"{gpu['name']}, capability {gpu['capability']}, {memory}, driver "
        f"{gpu.get('driver') or 'unknown'}; torch {report['torch']}, Python {report['python']}; "
        f"commit {commit}"
    )


def cell(text: str, width: int = 300) -> str:
    """On one line of a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= width else text[: width - 3] + "..."


def markdown(report: dict) -> str:
    word = "ok" if report["ok"] else "NOT ok"
    if report["partial"]:
        word += " (a part of it)"
    if not report["complete"]:
        word += ", stopped before its end"
    lines = [f"## gpu_check: {word}", "", heading(report), "", f"`{report['command']}`", ""]
    lines += ["| step | result | seconds | what came of it |", "| --- | --- | --- | --- |"]
    for step in report["steps"]:
        seconds = f"{step['seconds']:.0f}" if step["seconds"] else ""
        result = step["status"].upper() if step["status"] == "failed" else step["status"]
        lines.append(f"| {step['name']} | {result} | {seconds} | {cell(step['detail'])} |")
    if report["not_ok"]:
        lines += ["", "Not ok because of:", ""]
        lines += [f"- {cell(reason)}" for reason in report["not_ok"]]
    for step in report["steps"]:
        table = tables(step["tail"]) if step["name"] in SHOWN else ""
        if table:
            lines += ["", f"{step['name']}:", "", "```", table, "```"]
    return "\n".join(lines) + "\n"
