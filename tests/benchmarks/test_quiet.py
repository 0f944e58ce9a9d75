import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import quiet
from benchmarks.quiet import TICKS, Busy, foreign_cores, machine_seconds, process_seconds

FIELDS = ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice"]


def stat(**ticks: int) -> str:
    return "cpu  " + " ".join(str(ticks.get(name, 0)) for name in FIELDS) + "\ncpu0 9 9 9 9 9 9 9 9 9 9\n"


@pytest.mark.parametrize("field", FIELDS)
def test_what_counts_as_busy(field):
    busy = field not in ("idle", "iowait", "guest", "guest_nice")
    assert machine_seconds(stat(**{field: 5 * TICKS})) == (5.0 if busy else 0.0)


def test_a_process_may_have_any_name():
    times = [str(seconds * TICKS) for seconds in (1, 2, 4, 8)]
    fields = ["S", *["7"] * 10, *times, *["7"] * 30]
    assert process_seconds(f"17 (a) b) (c) {' '.join(fields)}") == 1 + 2 + 4 + 8


def test_foreign_time_is_what_the_machine_did_and_we_did_not():
    assert foreign_cores(Busy(100.0, 10.0), Busy(108.0, 14.0), seconds=2.0) == 2.0


def test_rounding_of_the_accounts_is_not_negative_work():
    assert foreign_cores(Busy(100.0, 10.0), Busy(101.0, 11.02), seconds=1.0) == 0.0


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat on this system")
def test_a_busy_process_is_foreign_unless_it_is_ours():
    spin = "import time\nprint(flush=True)\nwhile time.process_time() < 30: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        accounts = [(quiet.read([]), quiet.read([process.pid]))]
        account = Path(f"/proc/{process.pid}/stat")
        used = quiet.process_seconds(account.read_text())
        time.sleep(0.5)
        accounts.append((quiet.read([]), quiet.read([process.pid])))
        used = quiet.process_seconds(account.read_text()) - used
        process.kill()
    (stranger_before, ours_before), (stranger_after, ours_after) = accounts
    stranger = foreign_cores(stranger_before, stranger_after, 0.5)
    ours = foreign_cores(ours_before, ours_after, 0.5)
    assert used > 0.05
    assert stranger - ours == pytest.approx(used / 0.5, abs=0.1)
