//! Streams and events.

use std::ffi::{c_int, c_uint};

use super::{exports, out, waiting_exports};
use crate::codes;

waiting_exports! {
    fn cuStreamSynchronize(stream: usize) |driver| {
        driver.synchronize_stream(stream)
    }

    fn cuEventSynchronize(event: usize) |driver| {
        driver.synchronize_event(event)
    }
}

exports! {
    fn cuStreamCreate(stream: *mut usize, flags: c_uint) |driver| {
        // SAFETY: the contract of this function of the driver.
        let stream = unsafe { out(stream)? };
        stream.write(driver.create_stream(flags, 0)?);
        Ok(())
    }

    fn cuStreamCreateWithPriority(stream: *mut usize, flags: c_uint, priority: c_int) |driver| {
        // SAFETY: the contract of this function of the driver.
        let stream = unsafe { out(stream)? };
        stream.write(driver.create_stream(flags, priority)?);
        Ok(())
    }

    fn cuStreamDestroy_v2(stream: usize) |driver| {
        driver.destroy_stream(stream)
    }

    fn cuStreamQuery(stream: usize) |driver| {
        driver.query_stream(stream)
    }

    fn cuStreamWaitEvent(stream: usize, event: usize, flags: c_uint) |driver| {
        driver.wait_event(stream, event, flags)
    }

    fn cuStreamIsCapturing(stream: usize, status: *mut c_uint) |driver| {
        driver.queue_of(stream)?;
        // SAFETY: the contract of this function of the driver.
        unsafe { out(status)? }.write(0);
        Ok(())
    }

    fn cuStreamGetCtx(stream: usize, context: *mut usize) |driver| {
        let queue = driver.queue_of(stream)?;
        let of_queue = driver.queues.get(queue).map(|queue| queue.context).ok_or(codes::INVALID_HANDLE)?;
        // SAFETY: the contract of this function of the driver.
        unsafe { out(context)? }.write(of_queue);
        Ok(())
    }

    fn cuStreamGetFlags(stream: usize, flags: *mut c_uint) |driver| {
        driver.queue_of(stream)?;
        // SAFETY: the contract of this function of the driver.
        unsafe { out(flags)? }.write(driver.streams.get(&stream).map_or(0, |stream| stream.flags));
        Ok(())
    }

    fn cuStreamGetPriority(stream: usize, priority: *mut c_int) |driver| {
        driver.queue_of(stream)?;
        // SAFETY: the contract of this function of the driver.
        unsafe { out(priority)? }.write(driver.streams.get(&stream).map_or(0, |stream| stream.priority));
        Ok(())
    }

    fn cuEventCreate(event: *mut usize, flags: c_uint) |driver| {
        // SAFETY: the contract of this function of the driver.
        let event = unsafe { out(event)? };
        event.write(driver.create_event(flags)?);
        Ok(())
    }

    fn cuEventDestroy_v2(event: usize) |driver| {
        driver.destroy_event(event)
    }

    fn cuEventRecord(event: usize, stream: usize) |driver| {
        driver.record_event(event, stream)
    }

    fn cuEventQuery(event: usize) |driver| {
        driver.query_event(event)
    }

    fn cuEventElapsedTime(milliseconds: *mut f32, start: usize, end: usize) |driver| {
        let elapsed = driver.elapsed(start, end)?;
        // SAFETY: the contract of this function of the driver.
        unsafe { out(milliseconds)? }.write(elapsed);
        Ok(())
    }

    fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: usize, end: usize) |driver| {
        let elapsed = driver.elapsed(start, end)?;
        // SAFETY: the contract of this function of the driver.
        unsafe { out(milliseconds)? }.write(elapsed);
        Ok(())
    }
}
