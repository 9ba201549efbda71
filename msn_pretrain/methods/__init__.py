"""Pre-training methods: MSN and SimSiam."""
