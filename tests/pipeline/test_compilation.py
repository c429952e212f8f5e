import jax
import jax.numpy as jnp
import pytest
from jax import monitoring

from pipeline.compilation import num_compiling, watch_compilation


def test_programs_are_counted_while_they_are_compiled_and_no_longer() -> None:
    watch_compilation()
    watch_compilation()  # counts nothing twice
    seen: list[int] = []

    def note(event: str, value: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(num_compiling())

    monitoring.register_scalar_listener(note)
    try:
        value = jax.jit(lambda x: jnp.sin(x) * 3.25 + x)(jnp.ones(7))
        assert value.shape == (7,)
    finally:
        monitoring.unregister_scalar_listener(note)
    assert set(seen) == {1}
    assert num_compiling() == 0


def test_a_program_that_cannot_be_compiled_is_not_counted_for_ever() -> None:
    watch_compilation()
    lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(3))
    with pytest.raises(Exception, match="no_such_option"):
        lowered.compile({"no_such_option": 1})
    assert num_compiling() == 0
