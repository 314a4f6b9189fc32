"""What others took of the machine while workers took turns; clocks and workers are replaced."""

import types

import pytest

from bench import interleave


class Machine:
    """Clocks that go on as it is used."""

    def __init__(self):
        self.wall = self.busy = self.own = 0.0

    def run(self, wall, worker=0.0, own=0.0, others=0.0):
        self.wall += wall
        self.own += own
        self.busy += worker + own + others


class Worker:
    def __init__(self, name, machine):
        self.name, self.machine, self.cpu = name, machine, 30.0  # of its start

    def ask(self, request):
        self.machine.run(1.0, worker=2.0, own=0.5, others=0.25)
        self.cpu += 2.0
        return {"ms": 1.0, "after_pause_ms": 2.0, "cpu_s": self.cpu, "peak_rss_mib": 100}


def test_what_we_take_ourselves_is_not_that_of_others(monkeypatch):
    machine = Machine()
    clocks = {"perf_counter": lambda: machine.wall, "process_time": lambda: machine.own, "sleep": machine.run}
    monkeypatch.setattr(interleave, "time", types.SimpleNamespace(**clocks))
    monkeypatch.setattr(interleave, "busy_seconds", lambda: machine.busy)
    turns = interleave.take_turns([Worker("a", machine), Worker("b", machine)], 3)
    assert turns.ms == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert turns.other_cores == pytest.approx(0.25 / (1 + interleave.PAUSE_S), abs=0.005)
