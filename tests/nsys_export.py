"""Small SQLite files in the schema of nsys' export, with what a recording of moebench leaves in them."""

import sqlite3
from contextlib import closing

# From the schema reference of the Nsight Systems user guide; columns that nobody reads are left out.
SCHEMA = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE TARGET_INFO_GPU (id INTEGER NOT NULL PRIMARY KEY, name TEXT, totalMemory INTEGER, l2CacheSize INTEGER, smCount INTEGER,
    computeMajor INTEGER, computeMinor INTEGER);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, text TEXT, globalTid INTEGER, textId INTEGER,
    domainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL, globalTid INTEGER, correlationId INTEGER,
    nameId INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, streamId INTEGER NOT NULL,
    correlationId INTEGER, globalPid INTEGER, demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER,
    globalPid INTEGER, bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMSET (start INTEGER NOT NULL, end INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER,
    globalPid INTEGER, value INTEGER NOT NULL, graphNodeId INTEGER);
"""
PROCESS, THREAD = 0x2A << 24, (0x2A << 24) + 7
OTHER_PROCESS = 0x2B << 24
OURS, THEIRS = 3, 4  # NVTX domains
GRAPH_LAUNCH = "cudaGraphLaunch_v10000"
COPY_KINDS = {"Memcpy HtoD": 1, "Memcpy DtoH": 2, "Memcpy DtoD": 8}


class Export:
    """Writes tables; times in nanoseconds."""

    def __init__(self, path, schema=SCHEMA):
        self.path, self._strings, self._correlation = path, {}, 0
        self._connection = sqlite3.connect(path)
        self._connection.executescript(schema)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with closing(self._connection):
            self._connection.commit()

    def row(self, table, **values):
        names = ", ".join(f'"{name}"' for name in values)
        self._connection.execute(f"INSERT INTO {table} ({names}) VALUES ({', '.join('?' * len(values))})", tuple(values.values()))

    def gpu(self):
        self.row(
            "TARGET_INFO_GPU",
            id=0,
            name="NVIDIA H200",
            totalMemory=150 << 30,
            l2CacheSize=60 << 20,
            smCount=132,
            computeMajor=9,
            computeMinor=0,
        )

    def domain(self, name, number, process=PROCESS):
        self.row("NVTX_EVENTS", start=0, end=None, eventType=75, text=name, globalTid=process + 7, domainId=number)

    def range(self, text, start, end, thread=THREAD, domain=OURS, registered=True):
        """A push/pop range whose text is a registered string, as the nvtx package leaves it, or in the row itself."""
        values = {"textId": self.string(text)} if registered else {"text": text}
        self.row("NVTX_EVENTS", start=start, end=end, eventType=59, globalTid=thread, domainId=domain, **values)

    def launch(self, start, thread=THREAD, name="cudaLaunchKernel_v7000"):
        """The correlation id."""
        self._correlation += 1
        self.row(
            "CUPTI_ACTIVITY_KIND_RUNTIME",
            start=start,
            end=start + 5,
            globalTid=thread,
            correlationId=self._correlation,
            nameId=self.string(name),
        )
        return self._correlation

    def activity(self, event, correlation, node=None, process=PROCESS):
        shared = {
            "start": event.start_ns,
            "end": event.end_ns,
            "streamId": event.stream,
            "correlationId": correlation,
            "globalPid": process,
            "graphNodeId": node,
        }
        if event.kind == "kernel":
            name = self.string(event.name)
            self.row("CUPTI_ACTIVITY_KIND_KERNEL", **shared, deviceId=0, demangledName=name, shortName=name)
        elif event.kind == "memcpy":
            self.row("CUPTI_ACTIVITY_KIND_MEMCPY", **shared, bytes=1024, copyKind=COPY_KINDS[event.name])
        else:
            self.row("CUPTI_ACTIVITY_KIND_MEMSET", **shared, value=0)

    def string(self, text):
        if text not in self._strings:
            self._strings[text] = len(self._strings) + 1
            self.row("StringIds", id=self._strings[text], value=text)
        return self._strings[text]


def recording(path, case, backend, calls, graph=False, known_launch=True):
    """As `moebench profile --tool nsys` leaves it: the check's kernels before, a flush before each call, a range around each."""
    from moebench.timeline import Event

    with Export(path) as export:
        export.gpu()
        export.domain("moebench", OURS)
        export.domain("somebody", THEIRS)
        first, last = calls[0][0].start_ns, calls[-1][-1].end_ns
        export.range(f"case|{backend}|{case.key}", first - 90_000, last + 90_000)
        export.range("phase|profile", first - 60_000, last + 60_000, registered=False)
        checked = export.launch(first - 80_000)
        export.activity(Event(name="gate_up_kernel", start_ns=first - 79_000, end_ns=first - 78_000), checked)
        for events in calls:
            start, end = events[0].start_ns, events[-1].end_ns
            export.range("call", start - 10_000, end + 5_000)
            export.range("call", start - 50_000, end + 50_000, domain=THEIRS)
            flush = export.launch(start - 40_000)
            export.activity(Event(name="void at::native::reduce_kernel<512, 1>", start_ns=start - 39_000, end_ns=start - 12_000), flush)
            replayed = export.launch(start - 9_000, name=GRAPH_LAUNCH) if graph and known_launch else checked
            for number, event in enumerate(events):
                launched = replayed if graph else export.launch(start - 9_000 + number)
                export.activity(event, launched, node=100 + number if graph else None)
    return path
