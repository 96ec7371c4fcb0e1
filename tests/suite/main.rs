mod algorithms;
mod common;
mod llama;
mod smol_tmp;
