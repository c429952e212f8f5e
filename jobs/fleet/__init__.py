"""Many runs: what is stale, carrying it out here or as Ray Jobs, and how it stands."""
