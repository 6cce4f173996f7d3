! Prints where the fields of tessera.f90's types lie; layout.c prints the same of tessera.h.
program layout
  use tessera
  implicit none
  type(tessera_options), target :: options
  type(tessera_tensor), target :: tensor
  type(tessera_tick_io), target :: tick
  type(tessera_load_options), target :: load_options
  type(tessera_step), target :: step
  type(tessera_blob_info), target :: blob_info
  call field('options%size', c_loc(options), c_loc(options%size))
  call field('options%url', c_loc(options), c_loc(options%url))
  call field('options%mpi_comm', c_loc(options), c_loc(options%mpi_comm))
  call field('options%read_only', c_loc(options), c_loc(options%read_only))
  call field('options%keep_last', c_loc(options), c_loc(options%keep_last))
  call field('options%rewind', c_loc(options), c_loc(options%rewind))
  call field('options%staging_bytes', c_loc(options), c_loc(options%staging_bytes))
  call field('options%chunk_bytes', c_loc(options), c_loc(options%chunk_bytes))
  call field('options%writers', c_loc(options), c_loc(options%writers))
  call field('options%lease_seconds', c_loc(options), c_loc(options%lease_seconds))
  call field('options%build', c_loc(options), c_loc(options%build))
  call field('options%mesh', c_loc(options), c_loc(options%mesh))
  call field('options%warn', c_loc(options), c_loc(options%warn))
  call field('options%warn_arg', c_loc(options), c_loc(options%warn_arg))
  print '(a, i0)', 'options ', c_sizeof(options)
  call field('tensor%size', c_loc(tensor), c_loc(tensor%size))
  call field('tensor%part', c_loc(tensor), c_loc(tensor%part))
  call field('tensor%name', c_loc(tensor), c_loc(tensor%name))
  call field('tensor%dtype', c_loc(tensor), c_loc(tensor%dtype))
  call field('tensor%ndim', c_loc(tensor), c_loc(tensor%ndim))
  call field('tensor%shape', c_loc(tensor), c_loc(tensor%shape))
  call field('tensor%offset', c_loc(tensor), c_loc(tensor%offset))
  call field('tensor%length', c_loc(tensor), c_loc(tensor%length))
  call field('tensor%run_begin', c_loc(tensor), c_loc(tensor%run_begin))
  call field('tensor%run_end', c_loc(tensor), c_loc(tensor%run_end))
  call field('tensor%stride', c_loc(tensor), c_loc(tensor%stride))
  call field('tensor%data', c_loc(tensor), c_loc(tensor%data))
  call field('tensor%frozen', c_loc(tensor), c_loc(tensor%frozen))
  call field('tensor%alias_of', c_loc(tensor), c_loc(tensor%alias_of))
  print '(a, i0)', 'tensor ', c_sizeof(tensor)
  call field('tick%size', c_loc(tick), c_loc(tick%size))
  call field('tick%flag', c_loc(tick), c_loc(tick%flag))
  call field('tick%phase', c_loc(tick), c_loc(tick%phase))
  call field('tick%committed', c_loc(tick), c_loc(tick%committed))
  print '(a, i0)', 'tick ', c_sizeof(tick)
  call field('load_options%size', c_loc(load_options), c_loc(load_options%size))
  call field('load_options%parts', c_loc(load_options), c_loc(load_options%parts))
  call field('load_options%names', c_loc(load_options), c_loc(load_options%names))
  call field('load_options%roles', c_loc(load_options), c_loc(load_options%roles))
  call field('load_options%allow', c_loc(load_options), c_loc(load_options%allow))
  print '(a, i0)', 'load_options ', c_sizeof(load_options)
  call field('step%size', c_loc(step), c_loc(step%size))
  call field('step%step', c_loc(step), c_loc(step%step))
  call field('step%time_ns', c_loc(step), c_loc(step%time_ns))
  call field('step%attempt', c_loc(step), c_loc(step%attempt))
  call field('step%parent_attempt', c_loc(step), c_loc(step%parent_attempt))
  call field('step%run_id', c_loc(step), c_loc(step%run_id))
  call field('step%tensors', c_loc(step), c_loc(step%tensors))
  call field('step%blobs', c_loc(step), c_loc(step%blobs))
  call field('step%build', c_loc(step), c_loc(step%build))
  call field('step%ranks', c_loc(step), c_loc(step%ranks))
  call field('step%mesh', c_loc(step), c_loc(step%mesh))
  print '(a, i0)', 'step ', c_sizeof(step)
  call field('blob_info%size', c_loc(blob_info), c_loc(blob_info%size))
  call field('blob_info%part', c_loc(blob_info), c_loc(blob_info%part))
  call field('blob_info%name', c_loc(blob_info), c_loc(blob_info%name))
  call field('blob_info%rank', c_loc(blob_info), c_loc(blob_info%rank))
  call field('blob_info%data', c_loc(blob_info), c_loc(blob_info%data))
  call field('blob_info%bytes', c_loc(blob_info), c_loc(blob_info%bytes))
  print '(a, i0)', 'blob_info ', c_sizeof(blob_info)
contains
  subroutine field(name, base, at)
    character(len=*), intent(in) :: name
    type(c_ptr), intent(in) :: base, at
    print '(2a, i0)', name, ' ', transfer(at, 0_c_intptr_t) - transfer(base, 0_c_intptr_t)
  end subroutine
end program
