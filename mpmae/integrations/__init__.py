"""The encoders inside other toolkits; each module needs its toolkit installed, nothing else here imports them."""
