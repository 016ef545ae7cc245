"""A real Slurm of a few nodes on one machine: what the tests of this folder submit their jobs to.

munge, slurmctld and one slurmd a node, unmodified. A node is a pid, mount, host-name and network namespace of its
own, so that `hostname` is node1, ending its first process is a power cut, and taking its link down cuts it off. All
of it hangs on one network namespace without a way out. GPUs are copies of the null device: Slurm counts them and
sets CUDA_VISIBLE_DEVICES. Processes are tracked by their parents (linuxproc): nothing tidies up after a task that
leaves children behind, so a test would see them.

Every daemon is started with a parent-death signal: when the test session ends, however it ends, so does the cluster.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from tests.slurm.configuration import CLIENT, CONF, NODE, NODE_INIT

NETWORK = "10.78.0"
DISK_BYTES = 128 << 20
DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "srun", "scancel", "squeue", "sinfo", "scontrol")
SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


def missing() -> str | None:
    """Why no cluster can be started here; None when one can."""
    if os.geteuid() != 0:
        return "needs root (namespaces, device files)"
    for tool in (*DAEMONS, *CLIENTS, "ip", "unshare", "nsenter", "setpriv"):
        if shutil.which(tool, path=SEARCH) is None:
            return f"{tool} is not installed: apt-get install slurmctld slurmd slurm-client munge iproute2 util-linux"
    probe = (
        "unshare",
        "--net",
        "--mount",
        "--uts",
        "--pid",
        "--fork",
        "sh",
        "-c",
        "ip link add br0 type bridge",
    )
    if subprocess.run(probe, capture_output=True, env={"PATH": SEARCH}).returncode:
        return "this machine does not allow network namespaces (CAP_SYS_ADMIN, CAP_NET_ADMIN)"
    return None


@dataclass
class Cluster:
    """`with Cluster(folder, nodes=2) as cluster: cluster.sbatch(...)`; folder must be short (unix sockets)."""

    folder: Path
    nodes: int = 2
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- what a user of a cluster does -----------------------------------------------------------------------

    def environment(self, **extra: str) -> dict[str, str]:
        """For a process that shall see this cluster: `sbatch` and the others come first in PATH."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RANK", "WORLD_SIZE"))}
        return kept | {"PATH": f"{self.folder}/bin:{kept['PATH']}:/usr/sbin"} | extra

    def run(self, *command: object, **extra: str) -> str:
        done = subprocess.run(
            list(map(str, command)), env=self.environment(**extra), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def usr1(self, job: object) -> None:
        """As before a time limit. scancel's own code says nothing: it fails where a process has left in the meantime."""
        command = ["scancel", "--signal=USR1", str(job)]
        subprocess.run(command, env=self.environment(), capture_output=True, timeout=60)

    def sbatch(self, *arguments: object, **extra: str) -> int:
        """Submit; the job's id."""
        return int(self.run("sbatch", "--parsable", *arguments, **extra).split(";")[0])

    def job(self, job_id: int) -> dict[str, str]:
        """`scontrol show job` as a mapping; of an array, its first element."""
        text = self.run("scontrol", "show", "job", job_id).split("\n\n")[0]
        return dict(item.split("=", 1) for item in text.split() if "=" in item)

    def wait(self, job_id: int, *states: str, seconds: float = 600) -> dict[str, str]:
        """Wait until the job is in one of `states` (default: has ended)."""
        until = time.monotonic() + seconds
        while (job := self.job(job_id))["JobState"] not in (states or ENDED):
            assert time.monotonic() < until, (
                f"job {job_id} is {job['JobState']} ({job['Reason']}) after {seconds} s"
            )
            time.sleep(0.2)
        return job

    # -- faults ----------------------------------------------------------------------------------------------

    def cut_power(self, node: int) -> None:
        """Everything on the node is gone at once."""
        self._end(f"node{node}")

    def boot(self, node: int) -> None:
        self._start_node(node)

    def pids(self, node: int) -> list[int]:
        """All processes of the node, as this machine numbers them."""
        namespace = Path(f"/proc/{self._init(node)}/ns/pid").readlink()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if (entry / "ns/pid").readlink() == namespace:
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def tasks(self, node: int) -> list[int]:
        """Processes of training ranks on the node."""
        return [pid for pid in self.pids(node) if _is_rank(_command(pid))]

    def running(self, node: int, *words: bytes) -> list[int]:
        """Processes of the node whose command line has all these words."""
        return [pid for pid in self.pids(node) if all(word in _command(pid) for word in words)]

    def kill_slurmd(self, node: int) -> None:
        """Its daemon alone: what runs there runs on."""
        for pid in self.running(node, b"slurmd\0-D"):
            os.kill(pid, signal.SIGKILL)

    def reboot(self, node: int) -> None:
        self.cut_power(node)
        self.boot(node)

    def left_in_memory(self, node: int) -> list[str]:
        """Files in the node's /dev/shm."""
        return [path.name for path in Path(f"/proc/{self._init(node)}/root/dev/shm").iterdir()]

    def freeze(self, node: int) -> None:
        self._signal_all(node, signal.SIGSTOP)

    def thaw(self, node: int) -> None:
        self._signal_all(node, signal.SIGCONT)

    def cut_link(self, node: int) -> None:
        self._inside("ip", "link", "set", f"v{node}", "down")

    def mend_link(self, node: int) -> None:
        self._inside("ip", "link", "set", f"v{node}", "up")

    @contextlib.contextmanager
    def narrow_link(self, node: int) -> Iterator[Callable[[], int]]:
        """8 Mbit/s to the node through a queue that holds 60 ms and drops the rest; gives how many packets were dropped."""
        link = f"v{node}"
        self._inside("tc", "qdisc", "add", "dev", link, "root", "tbf", "rate", "8mbit", "burst", "8kb", "latency", "60ms")  # fmt: skip

        def dropped() -> int:
            told = subprocess.check_output(
                [*self._net(), "tc", "-s", "qdisc", "show", "dev", link], text=True
            )
            return int(re.findall(r"dropped (\d+)", told)[0])

        try:
            yield dropped
        finally:
            self._inside("tc", "qdisc", "del", "dev", link, "root")

    def reset_connections(self, node: int) -> int:
        """Break every TCP connection that a rank of the node has with another node; gives how many there were."""
        inside = ("nsenter", "-t", str(self._init(node)), "-n", "ss")
        ranks, broken = {str(pid) for pid in self.tasks(node)}, 0
        for line in subprocess.check_output(
            [*inside, "-Htnp", "state", "established"], text=True
        ).splitlines():
            _, _, here, there, *process = line.split()
            if ranks & set(re.findall(r"pid=(\d+)", " ".join(process))) and here.rpartition(":")[0] != there.rpartition(":")[0]:  # fmt: skip
                ends = ("src", here, "dst", there)
                subprocess.run([*inside, "-K", *ends], check=True, capture_output=True)
                broken += 1
        return broken

    @contextlib.contextmanager
    def patience(self, seconds: int) -> Iterator[None]:
        """How long a silent node is given, instead of ten seconds (Slurm's default is 300)."""
        conf = self.folder / "slurm.conf"
        usual = conf.read_text()
        try:
            conf.write_text(re.sub(r"(?m)^SlurmdTimeout=.*", f"SlurmdTimeout={seconds}", usual))
            self.run("scontrol", "reconfigure")
            yield
        finally:
            conf.write_text(usual)
            self.run("scontrol", "reconfigure")

    @property
    def disk(self) -> Path:
        """A small file system that all nodes see."""
        return self.folder / "disk"

    def names(self, job_id: int) -> list[int]:
        """Numbers of the nodes that a job has; the first runs the batch script."""
        found = self.run("scontrol", "show", "hostnames", self.job(job_id)["NodeList"]).split()
        return [int(name.removeprefix("node")) for name in found]

    def on_node(self, node: int, *command: str) -> None:
        """Run a command as root on the node."""
        subprocess.run(["nsenter", "-t", str(self._init(node)), "-a", *command], check=True)

    def _signal_all(self, node: int, number: signal.Signals) -> None:
        for pid in self.pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def crash_controller(self, job_id: int) -> None:
        """Once it has written down that the job runs, which takes it up to five seconds; else it would forget the job, or start
        it twice."""
        started = datetime.fromisoformat(self.job(job_id)["StartTime"]).timestamp()
        until = time.monotonic() + 60
        while (self.folder / "state" / "job_state").stat().st_mtime < started + 1:
            assert time.monotonic() < until, "slurmctld has saved nothing for a minute"
            time.sleep(0.1)
        self._end("slurmctld")

    def start_controller(self) -> None:
        enter = ("nsenter", "-t", str(self.daemons["net"].pid), "-n", "-m", "-u")
        self._daemon("slurmctld", *enter, "slurmctld", "-D")

    # -- how it is built -------------------------------------------------------------------------------------

    def _start(self) -> None:
        assert len(str(self.folder)) < 80, "the path of a unix socket is limited"
        for name in ("state", "bin", "gpu", "keys", "disk"):
            (self.folder / name).mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", self.disk], check=True)
        self.folder.chmod(0o755)
        (self.folder / "keys").chmod(0o700)
        self._write_configuration()
        hosts = f"mount --bind {self.folder}/hosts /etc/hosts"
        bridge = f"ip link set lo up; ip link add br0 type bridge; ip addr add {NETWORK}.1/24 dev br0; ip link set br0 up"
        ready = self.folder / "net.up"
        inside = f"hostname slurmctl; {hosts}; {bridge}; touch {ready}; exec sleep infinity"
        unshare = ("unshare", "--net", "--mount", "--uts", "--propagation", "private")
        self._daemon("net", *unshare, "sh", "-ec", inside)
        self._until(ready.exists, "network")
        self._write_clients()
        socket = self.folder / "munge.sock"
        keys = self.folder / "keys"
        files = (f"--key-file={keys}/key", f"--pid-file={keys}/pid", f"--seed-file={keys}/seed")
        self._daemon(
            "munged", "munged", "-F", "--force", f"--socket={socket}", f"--log-file={keys}/log", *files
        )
        self._until(socket.exists, "munged")
        self.start_controller()
        for node in range(1, self.nodes + 1):
            self._start_node(node)
        self._until(lambda: self.idle() == self.nodes, "nodes")

    def up(self, node: int) -> bool:
        """Whether Slurm would give it, or has given it, to a job."""
        return self.run("sinfo", "-h", "-n", f"node{node}", "-p", "batch", "-o", "%T").strip() in (
            "idle",
            "allocated",
            "mixed",
        )

    def idle(self) -> int:
        """How many nodes are up and free."""
        command = [str(self.folder / "bin/sinfo"), "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N"]
        return len(
            subprocess.run(command, env=self.environment(), capture_output=True, text=True).stdout.split()
        )

    def _write_configuration(self) -> None:
        names = [f"node{node}" for node in range(1, self.nodes + 1)]
        address = {name: f"{NETWORK}.{node + 1}" for node, name in enumerate(names, 1)}
        nodes = "".join(NODE.format(name=n, address=address[n], port=7000 + i) for i, n in enumerate(names))
        (self.folder / "slurm.conf").write_text(CONF.format(dir=self.folder, net=NETWORK, nodes=nodes))
        for gpu in range(8):
            os.mknod(self.folder / f"gpu/nvidia{gpu}", 0o20666, os.makedev(1, 3))
        gres = f"AutoDetect=off\nName=gpu Type=h100 File={self.folder}/gpu/nvidia[0-7]\n"
        (self.folder / "gres.conf").write_text(gres)
        (self.folder / "plugstack.conf").write_text("")
        (self.folder / "cgroup.conf").write_text("")
        lines = [f"{ip} {name}" for name, ip in {**address, "slurmctl": f"{NETWORK}.1"}.items()]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(lines) + "\n")
        key = self.folder / "keys/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)

    def _write_clients(self) -> None:
        for name in CLIENTS:
            wrapper = self.folder / "bin" / name
            real = shutil.which(name, path=SEARCH)
            wrapper.write_text(CLIENT.format(dir=self.folder, real=real, pid=self.daemons["net"].pid))
            wrapper.chmod(0o755)

    def _start_node(self, node: int) -> None:
        name, address = f"node{node}", f"{NETWORK}.{node + 1}"
        (self.folder / name).mkdir(exist_ok=True)
        linked = self.folder / f"{name}.linked"
        linked.unlink(missing_ok=True)
        spaces = (
            "--pid",
            "--fork",
            "--kill-child=KILL",
            "--mount",
            "--uts",
            "--net",
            "--propagation",
            "private",
        )
        enter = ("nsenter", "-t", str(self.daemons["net"].pid), "-n", "unshare", *spaces)
        script = NODE_INIT.format(dir=self.folder, name=name, address=address)
        self._daemon(name, *enter, "bash", "-c", script)
        self._until(lambda: self._init(node) > 0, name)
        # A fixed address of the card: the neighbours' caches stay right over a reboot.
        end = ("name", "eth0", "address", f"02:78:00:00:00:{node:02x}", "netns", str(self._init(node)))
        subprocess.run([*self._net(), "ip", "link", "del", f"v{node}"], capture_output=True)
        self._inside("ip", "link", "add", f"v{node}", "type", "veth", "peer", *end)
        self._inside("ip", "link", "set", f"v{node}", "master", "br0", "up")
        linked.touch()

    def _init(self, node: int) -> int:
        """The node's first process, seen from here; 0 while there is none."""
        return _child(self.daemons[f"node{node}"].pid)

    def _net(self) -> tuple[str, ...]:
        return ("nsenter", "-t", str(self.daemons["net"].pid), "-n")

    def _inside(self, *command: str) -> None:
        subprocess.run([*self._net(), *command], check=True)

    def _daemon(self, name: str, *command: str) -> None:
        environment = {"PATH": SEARCH, "SLURM_CONF": str(self.folder / "slurm.conf"), "LC_ALL": "C"}
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                [*WITH_PARENT, *command],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True,
            )  # fmt: skip

    def _until(self, ready: object, what: str, seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        while not ready():  # type: ignore[operator]
            assert time.monotonic() < until, f"{what} did not come up; see {self.folder}/*.log and *.out"
            for name, daemon in self.daemons.items():
                assert daemon.poll() is None, f"{name} ended; see {self.folder}/*.log and *.out"
            time.sleep(0.05)

    def _end(self, name: str) -> None:
        daemon = self.daemons.pop(name)
        if name.startswith("node") and daemon.poll() is None and (init := _child(daemon.pid)):
            os.kill(init, signal.SIGKILL)  # takes everything in its pid namespace along
        daemon.kill()
        daemon.wait()

    def stop(self) -> None:
        subprocess.run(["umount", "--lazy", self.disk], capture_output=True)
        for name in sorted(
            self.daemons, key=("munged", "net").count
        ):  # the network last: it holds the others
            self._end(name)


def _child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else 0


def _is_rank(command: bytes) -> bool:
    """A training rank: not the srun that names it in its own arguments."""
    return b"slurm.rank" in command and b"python" in command.split(b"\0")[0]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def describe(pid: int) -> str:
    """For a person: what the process is and in which state (T: stopped, D: in the kernel, Z: gone, not reaped)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        state = "gone by now"
    return f"{pid} {state} {_command(pid).replace(bytes(1), b' ').decode(errors='replace')[:200]}"
