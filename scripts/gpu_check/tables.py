"""The tables of docs/gpu.md, written from the record of a run on hardware, or saying that there was none."""
import pathlib

BEGIN, END = "<!-- written by scripts/gpu-check: begin -->", "<!-- end -->"
NOT_RUN = "not run on hardware"


class TablesError(Exception):
    """Says what keeps a table from being written."""


def facts_of(record, step):
    """Of a step that ran, passed or not; nothing where it did not."""
    for entry in record["steps"]:
        if entry["step"] == step and entry["result"] != "not run":
            return entry.get("facts") or {}
    return {}


def across_users(answer):
    if not answer:
        return NOT_RUN
    opens = "yes" if answer.get("opens") else f"no: {answer.get('refusal') or answer.get('error')}"
    event = "opens" if answer.get("event_opens") else f"does not: {answer.get('event_refusal', 'not tried')}"
    return f"{opens}; an event of that user {event}"


def cost(facts, name, size):
    figures = facts.get(f"{name}_{size}_MiB_us")
    if not figures:
        return NOT_RUN
    return f"first {figures['first']} us, then {figures['open']} us; closing {figures['close']} us"


def after_death(facts, kind):
    answer = facts.get(kind) or {}
    seen = [f"{value} {key[len('after_'):].replace('_', ' ')} later" for key, value in answer.items()
            if key.startswith("after_")]
    return ", ".join(seen) or NOT_RUN


def small(facts):
    opened = facts.get("opened")
    if not opened:
        return NOT_RUN
    right = [one.get("first_byte") for one in opened] == [1, 2]
    return (f"{'yes' if right else 'no'}: two of 4 KiB lie {facts['exporter'].get('apart')} bytes apart, in a range of "
            f"{opened[0].get('range_bytes', '?')} bytes")


def queue(facts):
    if not facts:
        return NOT_RUN
    if not facts["one_waited"]:
        return f"no: none of {facts['calls_before_one_waited']} calls behind a stream that stood still"
    return f"after {facts['calls_before_one_waited']} calls one waited for {facts['that_one_ms']} ms"


def bench(record, memory):
    facts = facts_of(record, f"bench, {memory}")
    if "refit_over_memcpy" not in facts:
        return NOT_RUN
    return f"{facts['refit_over_memcpy']:.3f} x ({facts.get('model', '?')})"


def torch(record, step):
    return facts_of(record, step).get("answer") or NOT_RUN


def answers(record):
    record = record or {"steps": []}
    legacy, vmm = facts_of(record, "two users, legacy"), facts_of(record, "two users, vmm")
    costs = facts_of(record, "costs of opening")
    death = facts_of(record, "memory of a killed process")
    rows = [
        ("a client's legacy handle in a daemon of root", across_users(legacy.get("client_to_root"))),
        ("the same in a daemon of another user", across_users(legacy.get("client_to_user"))),
        ("a client's segments by fd in a daemon of root", across_users(vmm.get("client_to_root"))),
        ("the same in a daemon of another user", across_users(vmm.get("client_to_user"))),
        ("does the handle of a small allocation open at its own bytes?",
         small(facts_of(record, "small allocations"))),
        ("legacy memory of a process that was killed", after_death(death, "legacy")),
        ("segments of a process that was killed", after_death(death, "vmm")),
    ]
    for size in (2, 20, 1024):
        rows.append((f"opening a legacy handle of {size} MiB", cost(costs, "open_legacy", size)))
        rows.append((f"mapping a segment of {size} MiB", cost(costs, "map_segment", size)))
    rows += [
        ("does a driver queue that is full block a call for long?", queue(facts_of(record, "a full queue"))),
        ("a refit from legacy memory, against cuMemcpyDtoD of the same bytes", bench(record, "cuda")),
        ("a refit from segments, against the same", bench(record, "cuda-vmm")),
        ("an offloaded engine's refit, against copies of the same bytes", bench(record, "offload")),
        ("torch's default allocator", torch(record, "torch, default allocator")),
        ("torch's expandable segments", torch(record, "torch, expandable segments")),
    ]
    return rows


def render(record):
    """The Markdown between the marks. `record` is what a run wrote, or None."""
    if record and record["fake"]:
        raise TablesError("this record is of the fake driver, whose figures stay out of docs/gpu.md")
    lines = []
    if record:
        names = ", ".join(device["name"] for device in record.get("devices", [])) or "unknown device"
        lines += [f"Of one run on {names}, driver {record.get('driver_version', '?')}.", ""]
    lines += ["| question | answer |", "|---|---|"]
    lines += [f"| {question} | {cell(text)} |" for question, text in answers(record)]
    lines += ["", "| step | result | seconds |", "|---|---|---|"]
    if record:
        for entry in record["steps"]:
            why = f": {cell(entry['why'])}" if entry.get("why") and entry["result"] != "passed" else ""
            lines.append(f"| {entry['step']} | {entry['result']}{why} | {entry['seconds']:.1f} |")
    else:
        lines.append(f"| all of them | {NOT_RUN} | |")
    return "\n".join(lines)


def cell(text):
    return " ".join(str(text).replace("|", "/").split())[:300]


def write(page, record):
    """Puts the tables of `record` between the marks of the file `page`."""
    path = pathlib.Path(page)
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise TablesError(f"{path}: the marks \"{BEGIN}\" and \"{END}\" must stand in it once, in this order")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{render(record)}\n{END}{after}")
