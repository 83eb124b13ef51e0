import pytest

# Suites that several test modules inherit: without this, their failed assertions would show no values.
pytest.register_assert_rewrite(f'{__name__}.contract', f'{__name__}.servicecontract')
