"""A hostile program: tries to reach the host in every way it knows and writes down, as JSON, what came of each.

Its arguments: files that it should not read, the host's process, a TCP port, and an abstract socket's name that listen there.
"""

import ctypes
import json
import os
import signal
import socket
import sys

descriptors = sorted(os.listdir("/proc/self/fd"))  # before any is opened here
secrets, host, port, abstract = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
libc = ctypes.CDLL(None, use_errno=True)
came: dict[str, list[str]] = {}


def attempt(name, action):
    """Notes what an action gave, or its error; an error is what the test hopes for."""
    try:
        came[name] = ["gave", repr(action())[:200]]
    except BaseException as error:
        came[name] = ["error", type(error).__name__]


def read(path):
    with open(path, "rb") as file:
        return file.read(4096)


def write(path):
    with open(path, "ab") as file:
        file.write(b"changed")


def call(function, *arguments):
    if function(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "refused")
    return "allowed"


def linked(path):
    os.symlink(path, "link")
    try:
        return read("link")
    finally:
        os.unlink("link")


def connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as line:
        line.settimeout(2)
        line.connect(address)
        return "connected"


def run_set_user_id():
    """A copy of a program, marked to run as another user, gains nothing, even where the mark can be set."""
    with open("/usr/bin/id", "rb") as file, open("id", "wb") as copy:
        copy.write(file.read())
    os.chmod("id", 0o6755)
    uid = os.popen("./id -u").read().strip()
    if uid == str(os.getuid()):
        raise PermissionError("still the same user")
    return uid


for secret in secrets:
    attempt(f"read {secret}", lambda secret=secret: read(secret))
    attempt(f"write {secret}", lambda secret=secret: write(secret))
    attempt(f"link {secret}", lambda secret=secret: linked(secret))
    attempt(f"hard link {secret}", lambda secret=secret: os.link(secret, "hard"))
    attempt(
        f"folder of {secret}", lambda secret=secret: [name for name in os.listdir(os.path.dirname(secret)) if "secret" in name][0]
    )
    for root in ("/proc/1/root", f"/proc/{host}/root", "/proc/self/root", "/proc/1/cwd/../../../..", "/../.."):
        attempt(f"through {root} {secret}", lambda root=root, secret=secret: read(root + secret))
for path in (
    *(
        "/etc/passwd",
        "/etc/shadow",
        "/proc/kcore",
        "/sys/kernel/notes",
        "/dev/mem",
        "/dev/vda",
        "/dev/sda",
        "/dev/kmsg",
        "/dev/tty",
    ),
    *("/proc/cmdline", "/proc/keys", "/proc/meminfo", "/proc/version", "/proc/sys/kernel/osrelease", "/dev/zero"),
    *("/run/docker.sock", "/var/log/wtmp", "/proc/1/environ", "/proc/1/mem", "/proc/1/maps"),
    *(f"/proc/{host}/environ", f"/proc/{host}/mem", f"/proc/{host}/maps"),
):
    attempt(f"read {path}", lambda path=path: read(path))
for path in (
    *(
        "/usr/lib/planted",
        "/bin/planted",
        "/planted",
        "/etc/planted",
        "/dev/planted",
        "/usr/bin/env",
        sys.executable,
        os.__file__,
    ),
    *("/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/proc/self/fd/0"),
):
    attempt(f"write {path}", lambda path=path: write(path))
attempt("hard link /usr/bin/env", lambda: os.link("/usr/bin/env", "env"))
attempt("write descriptor 0", lambda: os.write(0, b"x"))
attempt("stat outside", lambda: os.stat("/home/."))
for folder in ("/usr/src", "/usr/local/src", "/proc/sys"):
    attempt(f"first of {folder}", lambda folder=folder: os.listdir(folder)[0])
attempt("list /proc/1/fd", lambda: os.listdir("/proc/1/fd"))
attempt("signal the host", lambda: os.kill(host, signal.SIGKILL))
attempt("trace the first process", lambda: call(libc.ptrace, 16, 1, 0, 0))
attempt("trace the host", lambda: call(libc.ptrace, 16, host, 0, 0))
attempt("mount", lambda: call(libc.mount, b"none", b"/tmp", b"tmpfs", 0, None))
attempt("remount", lambda: call(libc.mount, b"none", b"/usr", None, 32 | 4096, None))
attempt("umount", lambda: call(libc.umount2, b"/proc", 2))
attempt("unshare user", lambda: call(libc.unshare, 0x10000000))
attempt("unshare mount", lambda: call(libc.unshare, 0x20000))
attempt("join", lambda: call(libc.setns, os.open("/proc/self/ns/user", os.O_RDONLY), 0))
attempt("chroot", lambda: os.chroot("/tmp"))
attempt("become root", lambda: os.setuid(0))
attempt("become root's group", lambda: os.setgid(0))
attempt("become another", lambda: os.setresuid(0, 65534, 0))
attempt("set groups", lambda: os.setgroups([0]))
attempt(
    "take capabilities", lambda: call(libc.capset, (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6))
)
attempt("set-user-id", run_set_user_id)
attempt("make a device", lambda: os.mknod("disk", 0o60666, os.makedev(8, 0)))
attempt("raise priority", lambda: os.setpriority(os.PRIO_PROCESS, 0, -5))
attempt("host name", lambda: socket.sethostname("planted"))
attempt("more processes", lambda: __import__("resource").setrlimit(6, (10**6, 10**6)))
attempt("memory file", lambda: os.memfd_create("hidden"))
attempt("shared segment", lambda: call(libc.shmget, 0, 1 << 20, 0o1600))
attempt("loopback", lambda: connect(socket.AF_INET, ("127.0.0.1", port)))
attempt("loopback 6", lambda: connect(socket.AF_INET6, ("::1", port)))
attempt("abstract socket", lambda: connect(socket.AF_UNIX, "\0" + abstract))
attempt("internet", lambda: connect(socket.AF_INET, ("1.1.1.1", 53)))
attempt("name service", lambda: socket.getaddrinfo("example.com", 80))
attempt("raw socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
attempt("packet socket", lambda: socket.socket(17, socket.SOCK_RAW))
attempt("virtual machine's host", lambda: socket.socket(40, socket.SOCK_STREAM))
for secret in secrets:
    if secret.endswith(".sock"):
        attempt(f"connect {secret}", lambda secret=secret: connect(socket.AF_UNIX, secret))

state = dict(line.split(":\t") for line in read("/proc/self/status").decode().splitlines() if ":\t" in line)
json.dump(
    {
        "came": came,
        "state": {name: state[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs", "Seccomp", "Groups")},
        "environment": dict(os.environ),
        "descriptors": descriptors,
        "processes": [int(name) for name in os.listdir("/proc") if name.isdigit()],
        "root": sorted(os.listdir("/")),
    },
    sys.stdout,
)
