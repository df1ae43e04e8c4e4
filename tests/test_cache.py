"""One folder for all caches."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2ml_torch.cache import cache_root


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"GPT2ML_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"GPT2ML_CACHE": "~/a", "HOME": "/c"}, "/c/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/gpt2ml"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/gpt2ml"),
        ({"GPT2ML_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/gpt2ml"),
    ],
)
def test_the_projects_own_variable_goes_before_the_users_cache_folder(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name in ("GPT2ML_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(expected)


def test_without_a_home_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GPT2ML_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OSError, match="Set GPT2ML_CACHE to a folder"):
        cache_root()
