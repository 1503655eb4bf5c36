"""Why there is no sandbox, on made-up machines."""

from pathlib import Path

import pytest

from posttrain.sandbox.diagnosis import advice


def machine(folder: Path, **files: str) -> Path:
    (folder / "self/ns").mkdir(parents=True)
    (folder / "self/ns/user").touch()
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"sys__kernel__apparmor_restrict_unprivileged_userns": "1\n"}, "AppArmor keeps ordinary users.*sysctl kernel.apparmor"),
        ({"sys__kernel__unprivileged_userns_clone": "0\n"}, "sysctl kernel.unprivileged_userns_clone=1"),
        ({"sys__user__max_user_namespaces": "0\n"}, "sysctl user.max_user_namespaces"),
        ({"self__status": "Name:\tx\nSeccomp:\t2\n"}, "a container probably forbids.*--security-opt seccomp"),
        ({"sys__kernel__apparmor_restrict_unprivileged_userns": "0\n", "self__status": "Seccomp:\t0\n"}, "needs Linux from 5.14"),
    ],
)
def test_the_cause_and_its_cure_are_named(tmp_path: Path, files: dict[str, str], said: str) -> None:
    import re

    assert re.search(said, advice(machine(tmp_path, **files), privileged=False))


def test_root_is_not_told_of_what_binds_ordinary_users(tmp_path: Path) -> None:
    folder = machine(tmp_path, sys__kernel__apparmor_restrict_unprivileged_userns="1", sys__kernel__unprivileged_userns_clone="0")
    assert "AppArmor" not in advice(folder, privileged=True) and "userns_clone" not in advice(folder, privileged=True)


def test_a_kernel_without_user_namespaces(tmp_path: Path) -> None:
    assert "CONFIG_USER_NS" in advice(tmp_path, privileged=True)
