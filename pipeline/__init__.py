"""One model × one recipe: quantized on Ray, block by block, through object storage."""
