from typing import Any

import optuna

# Numbers that are powers of two
POWERS = ("depth", "width", "batch_size", "transitions_per_update")


def convert_deepcrl_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for DeepCRL from parameters as Optuna stores them."""
    hyperparams = dict(sampled_params)
    for name in POWERS:
        hyperparams[name] = 2 ** hyperparams.pop(f"{name}_pow")
    hyperparams["gamma"] = 1 - hyperparams.pop("one_minus_gamma")
    hyperparams["policy_kwargs"] = {"energy": hyperparams.pop("energy")}
    return hyperparams


def sample_deepcrl_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """Sampler for DeepCRL hyperparams. What RL Zoo tells about envs and HerReplayBuffer is not used."""
    sampled_params: dict[str, Any] = {
        # 4 to 64 layers
        "depth_pow": trial.suggest_int("depth_pow", 2, 6),
        # 64 to 512 units
        "width_pow": trial.suggest_int("width_pow", 6, 9),
        # 128 to 1024 transitions
        "batch_size_pow": trial.suggest_int("batch_size_pow", 7, 10),
        # 4 to 64 transitions
        "transitions_per_update_pow": trial.suggest_int("transitions_per_update_pow", 2, 6),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 2e-3, log=True),
        "critic_learning_rate": trial.suggest_float("critic_learning_rate", 1e-5, 2e-3, log=True),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-3, 0.1, log=True),
        "logsumexp_coef": trial.suggest_float("logsumexp_coef", 1e-3, 1.0, log=True),
        "energy": trial.suggest_categorical("energy", ["norm", "squared", "dot", "cosine"]),
        "contrastive_loss": trial.suggest_categorical("contrastive_loss", ["forward", "backward", "symmetric"]),
    }
    if n_actions > 0:
        # Of continuous actions. The default is minus half of the number of dimensions
        sampled_params["target_entropy"] = trial.suggest_float("target_entropy", -2.0 * n_actions, 0.0)
    hyperparams = convert_deepcrl_params(sampled_params)
    # Display true values
    for name in (*POWERS, "gamma"):
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams
