"""Small pieces that every layer uses: rectified-flow algebra, timestep buckets, counter-based randomness."""
