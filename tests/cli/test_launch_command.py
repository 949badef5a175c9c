"""``windlass launch`` refuses in one line what it cannot start, and builds mpiexec's command."""

import pytest

from windlass.cli.launch import launch_argv, thread_variables
from windlass.errors import ConfigError


def test_the_program_keeps_its_own_arguments() -> None:
    argv = launch_argv(2, [__file__, "--epochs", "3", "-n", "5"], with_ft=False)
    assert argv[argv.index("-n") + 1] == "2" and argv[-5:] == [__file__, "--epochs", "3", "-n", "5"]
    assert argv[-7:-5] == ["-m", "mpi4py"]


def test_fault_tolerant_ranks_do_not_end_the_others() -> None:
    argv = launch_argv(3, ["-m", "package.train"], with_ft=True)
    assert argv[argv.index("--with-ft") + 1] == "ulfm" and "mpi4py" not in argv
    assert argv[-2:] == ["-m", "package.train"]


@pytest.mark.parametrize(
    ("program", "said"),
    [([], "nothing to launch"), (["nowhere.py"], "there is no file nowhere.py"), (["-m"], "needs a module")],
)
def test_what_cannot_be_started_is_one_line(program: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        launch_argv(2, program, with_ft=False)


def test_threads_are_asked_for_then_inherited_then_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert thread_variables(2, 3)["OMP_NUM_THREADS"] == "3"
    assert thread_variables(2, 0)["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert thread_variables(10_000, 0)["OMP_NUM_THREADS"] == "1"
