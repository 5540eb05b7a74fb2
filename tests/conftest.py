"""Eight virtual CPU devices for every test, asked for before jax starts a backend."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
