"""What a platform team deploys, checked by the validators of those who will read it."""
