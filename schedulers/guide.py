"""What people ask about a solver before they choose it: its formula, what else is the same, when to use it.

The command `diffgen schedulers show` and the table in `docs/schedulers.md` read this; solvers of other packages, which
do not stand here, have their docstring. No torch.

x is the state α·x0 + σ·ε, a prime is the level that the step goes to, ρ = σ/α, λ = ln(α/σ), h = λ' − λ, z fresh noise;
"first" is the first-order step α'·x0 + σ'·ε.
"""

from __future__ import annotations

from typing import NamedTuple


class Advice(NamedTuple):
    formula: str
    same: str  # which names and options stand for the same algorithm
    when: str


GUIDE: dict[str, Advice] = {
    "consistency": Advice(
        "x' = α'·(x0 + √(ρ'² − ρ_min²)·z)",
        "",
        "Consistency models only, in one to four evaluations.",
    ),
    "ddim_inverse": Advice(
        "x' = (α'/α)·x + (σ' − α'ρ)·ε(x, t')",
        "",
        "The way back: from a picture to the noise that euler makes it from, for edits that keep its layout.",
    ),
    "ddpm": Advice(
        "x' = α'·x0 + √(σ'² − β̃)·ε + √β̃·z, β̃ = σ'²·(1 − (ρ'/ρ)²)",
        "fixed_small: euler_ancestral, euler(eta=1), SDE-DPM-Solver++ of first order",
        "The paper's own sampler, and learned variances; wants hundreds of evaluations.",
    ),
    "deis": Advice(
        "x' = (α'/α)·x + α'·∫ε dρ, ε a polynomial in λ through the latest `order` answers",
        'order 1: euler; 2: dpm_solver\'s "heun" form; 3: multistep DPM-Solver-3',
        "From 7 evaluations on with Stable Diffusion's noise, later with others: what schedulers.recommend takes.",
    ),
    "dpm2": Advice(
        "x' = (α'/α)·x + α'(ρ' − ρ)·ε(x_m, λ_m), λ_m = (λ + λ')/2, x_m the first-order step to λ_m",
        "DPM-Solver-2, single-step, r = 1/2",
        "For comparison with older pictures; multistep solvers make more of the same evaluations.",
    ),
    "dpm2_ancestral": Advice(
        "dpm2 to σ_down, then σ_up·z: σ_up = η·σ'·√(1 − (ρ'/ρ)²), σ_down² = σ'² − σ_up²",
        "eta=0: dpm2",
        "As euler_ancestral, at twice the evaluations.",
    ),
    "dpm_adaptive": Advice(
        "DPM-Solver of orders p and p − 1 over one step; h grows or shrinks by (tolerance/difference)^(1/p)",
        "",
        "Where the error is given and not the budget. Native loop only.",
    ),
    "dpm_solver": Advice(
        "x' = first + Σ c_j·(f_j − f), f = ε or x0 at earlier points (multistep) or at a step's stages (singlestep)",
        "multistep: order 1 is euler; 2 of x0 dpmpp_2m; 3 of x0 dpmpp_3m; 3 of eps deis",
        "To choose order, layout and quantity one by one, or to match diffusers' DPM-Solver classes.",
    ),
    "dpmpp_2m": Advice(
        "x' = (σ'/σ)·x + α'(1 − e^(−h))·(x0 + h/(2h₋)·(x0 − x0₋)), ₋ the step before",
        'dpm_solver(order=2, of="x0"); variant="heun": res_multistep; dpmpp_2m_sde(eta=0)',
        "The common choice for guided sampling in 15 to 30 evaluations.",
    ),
    "dpmpp_2m_sde": Advice(
        "dpmpp_2m with e^(−(1+η)h) for e^(−h), then σ'·√(1 − e^(−2ηh))·z",
        "eta=0: dpmpp_2m",
        "Pictures with fresh detail in 20 to 50 evaluations.",
    ),
    "dpmpp_2s": Advice(
        "x' = (σ'/σ)·x + α'(1 − e^(−h))·x0(x_m, λ_m), λ_m = (λ + λ')/2",
        "DPM-Solver++(2S)",
        "Where no history can be kept; else dpmpp_2m does better at the same evaluations.",
    ),
    "dpmpp_2s_ancestral": Advice(
        "dpmpp_2s to σ_down, then σ_up·z, as dpm2_ancestral",
        "eta=0: dpmpp_2s",
        "To match pictures made with DPM++ 2S a.",
    ),
    "dpmpp_3m": Advice(
        "x' = (σ'/σ)·x + σ'·∫e^λ x0 dλ, x0 a parabola in λ through the latest three answers",
        'dpm_solver(order=3, of="x0"); dpmpp_3m_sde(eta=0)',
        "Accurate solutions in 40 evaluations or more; with fewer, deis has less error.",
    ),
    "dpmpp_3m_sde": Advice(
        "dpmpp_3m with the kernel e^((1+η)λ), then σ'·√(1 − e^(−2ηh))·z",
        "eta=0: dpmpp_3m",
        "As dpmpp_2m_sde, in 30 evaluations or more.",
    ),
    "dpmpp_sde": Advice(
        "dpmpp_2s for the reverse SDE; both noises of a step are parts of one Brownian path",
        "eta=0: dpmpp_2s",
        "To match pictures made with DPM++ SDE; few steps go far, each costs two evaluations.",
    ),
    "edm": Advice(
        "ρ̂ = ρ·(1 + γ), x̂ = x + α̂·√(ρ̂² − ρ²)·z, then heun (or euler) from (x̂, ρ̂)",
        "s_churn=0: heun, or euler",
        "EDM's stochastic sampler, for hundreds of evaluations; churn makes up for a network's errors.",
    ),
    "er_sde": Advice(
        "x' = α'·x0 + σ'·(k·ε + √(1 − k²)·z) + Σ c_j·(x0_j − x0), k = g(ρ')/g(ρ), g = e^(ρ^0.3) + 10",
        "",
        "Noise early, hardly any late: fresh detail with clean ends, in 15 to 30 evaluations.",
    ),
    "euler": Advice(
        "x' = α'·x0 + σ'·ε",
        "DDIM; order 1 of DPM-Solver, DPM-Solver++, DEIS and UniPC; eta=1: euler_ancestral and ddpm",
        "The plain step: never wrong, seldom best. Distilled flow models, and wherever others have trouble.",
    ),
    "euler_ancestral": Advice(
        "x' = α'·x0 + σ_down·ε + σ_up·z, σ_up = η·σ'·√(1 − (ρ'/ρ)²), σ_down² = σ'² − σ_up²",
        "euler(eta=1), DDIM(η = 1), ddpm (fixed_small), SDE-DPM-Solver++ of first order",
        "Varied pictures in 20 to 40 evaluations; the picture goes on changing with the number of steps.",
    ),
    "heun": Advice(
        "x' = first + α'(ρ' − ρ)/2·(ε(first, t') − ε)",
        "edm(s_churn=0)",
        "Accurate solutions of second order with no history; below 10 evaluations it is the worst choice.",
    ),
    "ipndm": Advice(
        "x' = first + α'(ρ' − ρ)·Σ c_j·(ε_j − ε), c_j of Adams–Bashforth with even steps",
        "",
        "5 and 6 evaluations, up to 31 on flows, up to 14 on EDM models: what schedulers.recommend takes (order 3).",
    ),
    "ipndm_v": Advice(
        "x' = first + α'·Σ c_j·(ε_j − ε), c_j of Adams–Bashforth with the steps taken",
        "lms",
        "Under this name in diff-sampler and ComfyUI; ipndm is better at few evaluations.",
    ),
    "lcm": Advice(
        "x' = α'·(c_skip·x + c_out·x0) + σ'·z",
        "",
        "Latent consistency models and LCM adapters only, in 2 to 8 evaluations, with little guidance.",
    ),
    "lms": Advice(
        "x' = (α'/α)·x + α'·∫ε dρ, ε a polynomial in ρ through the latest `order` answers",
        "ipndm_v",
        "To match older pictures; deis does better at few evaluations.",
    ),
    "pndm": Advice(
        "ipndm of order 4, the first step heun's",
        "PLMS",
        "To match pictures of Stable Diffusion 1, whose default it was; costs one evaluation more than steps.",
    ),
    "res_multistep": Advice(
        "x' = (σ'/σ)·x + σ'·∫e^λ x0 dλ, x0 a straight line in λ through the latest two answers",
        'dpmpp_2m(variant="heun")',
        "As dpmpp_2m; ComfyUI's workflows name it.",
    ),
    "restart": Advice(
        "heun; at ρ_low: x + α·√(ρ_high² − ρ_low²)·z, and down again",
        "",
        "Where many evaluations are allowed and errors of the network matter more than those of the solver.",
    ),
    "sa_solver": Advice(
        "predictor: multistep for the reverse SDE with η = τ²; corrector: the same with the new answer as a node",
        'tau=0, orders p and p + 1: unipc(variant="bh1", order=p)',
        "Fresh detail in 20 evaluations or more, at one evaluation a step.",
    ),
    "tcd": Advice(
        "x' = α'·x0 + (α'ρ_s)·ε + α'·√(ρ'² − ρ_s²)·z at the time s = (1 − η)·t'",
        "eta=0: euler",
        "Trajectory consistency models and TCD adapters only, in 2 to 8 evaluations.",
    ),
    "unipc": Advice(
        "predictor: x0 a polynomial in λ through the latest `order` answers; corrector: the same with the new one too",
        "order 1 without its corrector: euler; its order 2 predictor (bh2): dpmpp_2m",
        "Up to 4 evaluations: what schedulers.recommend takes there. Order 3: accurate solutions in 30 or more.",
    ),
}


def advice(name: str) -> Advice:
    """Of a solver by its canonical name; empty for solvers of other packages."""
    return GUIDE.get(name, Advice("", "", ""))
