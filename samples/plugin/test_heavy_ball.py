from heavy_ball import heavy_ball

from schedulers.testing import check_solver


def test_it_conforms():
    check_solver(heavy_ball)
