from gradient_estimation import gradient_estimation

from schedulers.testing import check_solver


def test_it_conforms():
    check_solver(gradient_estimation)
